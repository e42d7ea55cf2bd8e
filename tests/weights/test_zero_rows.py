"""weights/zero_rows.py: rows of zeros are not stored, and come back when the file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_gen.weights.model_folder import ModelFolderError, load_part, save_part

KEPT = torch.tensor([3, 50, 99])


def table() -> nn.Embedding:
    torch.manual_seed(0)
    words = nn.Embedding(100, 8)
    rows = words.weight.data[KEPT].half().float()
    words.weight.data.zero_()[KEPT] = rows
    return words


def test_rows_of_zeros_are_left_out_of_the_file_and_come_back(tmp_path: Path) -> None:
    save_part(table(), tmp_path / "part.safetensors")
    assert load_file(tmp_path / "part.safetensors")["weight"].shape == (3, 8)
    loaded = nn.Embedding(100, 8)
    load_part(loaded, tmp_path / "part.safetensors")
    assert torch.equal(loaded.weight, table().weight)


def test_other_matrices_are_stored_whole(tmp_path: Path) -> None:
    linear = nn.Linear(4, 4)
    linear.weight.data[:2] = 0
    save_part(linear, tmp_path / "part.safetensors")
    assert set(load_file(tmp_path / "part.safetensors")) == {"weight", "bias"}


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([3, 50], dtype=torch.int32),
        torch.tensor([50, 3, 99], dtype=torch.int32),
        torch.tensor([3, 50, 100], dtype=torch.int32),
        torch.tensor([-1, 50, 99], dtype=torch.int32),
        torch.tensor([3, 3, 99], dtype=torch.int32),
        torch.tensor([3.0, 50.0, 99.0]),
        torch.tensor([[3, 50, 99]], dtype=torch.int32),
    ],
    ids=["too few", "unordered", "beyond the end", "negative", "twice", "no integers", "no vector"],
)
def test_wrong_row_numbers_are_refused(rows: Tensor, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 8), "weight.rows": rows}, tmp_path / "part.safetensors")
    with pytest.raises(ModelFolderError, match="weight"):
        load_part(nn.Embedding(100, 8), tmp_path / "part.safetensors")
