"""near_duplicates.py: pictures that CLIP can hardly tell apart are dropped, the first is kept."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture_bytes

from clip_gen.__main__ import main
from clip_gen.data.archive import unpack
from clip_gen.files import ROOT
from clip_gen.training import near_duplicates
from clip_gen.training.near_duplicates import similar_to_earlier, without_near_duplicates
from clip_gen.weights.model_folder import load_base
from clip_gen.worlds.shapes.pairs import RenderedPictures


@pytest.mark.parametrize("block", [3, 1024])
def test_rows_close_to_an_earlier_kept_one_are_found(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK", block)
    angles = torch.tensor([0.0, 1.0, 0.1, 2.0, 1.05, 0.2, 2.0])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = similar_to_earlier(rows, 0.99)  # within 0.14 radians
    # Row 5 is close to row 2, which is dropped, and not to row 0.
    assert [(number, earlier) for number, earlier, _ in found] == [(2, 0), (4, 1), (6, 3)]
    assert found[0][2] == pytest.approx(np.cos(0.1), abs=1e-3)


def test_near_duplicates_of_an_archive_are_dropped_and_listed(tmp_path: Path) -> None:
    clip, shown = load_base(ROOT / "checkpoints" / "shapes").clip, RenderedPictures(12, 5, 64)
    noisy = np.clip(shown[3].astype(int) + np.random.default_rng(0).integers(-1, 2, shown[3].shape), 0, 255)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(12):
            archive.writestr(f"{number:02}.png", picture_bytes(shown[number]))
        archive.writestr("noisy.png", picture_bytes(noisy.astype(np.uint8)))
    pictures = unpack(tmp_path / "photos.zip", tmp_path / "pictures")
    assert len(pictures.paths) == 13
    left = without_near_duplicates(pictures, clip, 0.98, tmp_path)
    assert left.paths == pictures.paths[:12]
    assert [(one.name, one.reason) for one in left.skipped] == [("000013.png", "a near-duplicate")]
    assert left.skipped[0].detail.startswith("of 000004.png, cosine 0.9")
    assert without_near_duplicates(pictures, clip, 0.0, tmp_path) == pictures


def test_a_training_says_if_too_few_pictures_are_left(
    photos: Path, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--base", str(tiny_model_folder), "--drop-similar", "0.01"]
    assert main(["train", str(photos), "--out", str(tmp_path / "out"), *words]) == 1
    assert "drop_similar is 0.01: 1 pictures are left, and 8 are needed; give a higher one" in capsys.readouterr().err
