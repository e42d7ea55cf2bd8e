"""training/evaluations.py: FID and CMMD on held-back pictures while a training goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip_gen.training.callbacks import read_history
from clip_gen.training.fit import Machine
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings

SETTINGS = TrainSettings(
    vqgan_steps=4, transformer_steps=4, batch_size=4, precision="32-true", crop=False, flip=False, seed=3
)


def train(photos: Path, base: Path, out: Path, every: int) -> Path:
    Training(photos, out, replace(SETTINGS, base=str(base)), Machine(evaluate_every=every)).run()
    return out


def test_evaluations_are_in_the_record_and_the_report_and_leave_the_weights_alone(
    photos: Path, tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = train(photos, tiny_model_folder, tmp_path / "without", 0)
    with caplog.at_level("INFO"):
        out = train(photos, tiny_model_folder, tmp_path / "with", 3)
    record = json.loads((out / "model" / "training.json").read_text())
    for stage in ("vqgan", "gpt"):
        entries = [entry for entry in read_history(out / "work" / stage / "history.jsonl") if "cmmd" in entry]
        assert [entry["step"] for entry in entries] == [3, 4]  # every three, and at the end
        assert {"fid_clip", "cmmd"} <= set(record["stages"][stage])
        assert record["stages"][stage]["cmmd"] == entries[-1]["cmmd"]
        assert f"{stage} 4: fid_clip" in caplog.text
        weights = [load_file(folder / "work" / stage / f"{stage}.safetensors") for folder in (without, out)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert "on 2 held-back pictures, CLIP of the base (16)" in caplog.text
    page = (out / "report.html").read_text()
    if find_spec("matplotlib"):
        assert 'alt="FID of held-back pictures"' in page  # a curve
    assert "CMMD" not in (without / "report.html").read_text()
