"""training/expectation.py: what a training says before it starts, and what --dry-run says without starting it."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clip_gen.__main__ import main
from clip_gen.training import expectation
from clip_gen.training import folder as training_folder
from clip_gen.training.expectation import log_expectation, seconds_per_step
from clip_gen.training.fit import Machine
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings
from clip_gen.training.stage import FitConfig, Stage, adamw

SETTINGS = TrainSettings(batch_size=4, precision="32-true", crop=False, flip=False)


def test_a_dry_run_says_what_to_expect_and_trains_nothing(
    photos: Path, tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    words = ["train", str(photos), "--out", str(tmp_path / "out"), "--base", str(tiny_model_folder), "--batch-size=4"]
    short = ["--vqgan-steps=2", "--transformer-steps=2", "--no-crop", "--no-flip", "--adversarial-weight=0"]
    assert main([*words, *short[2:], "--vqgan-steps=200", "--transformer-steps=300", "--dry-run"]) == 0
    lines = dict(line.strip().split(maxsplit=1) for line in caplog.messages if line.startswith("  "))
    assert lines["pictures"] == (
        "24 usable pictures; skipped: a duplicate (1); a text file (1); 2 are held back to measure on"
    )
    assert lines["base"] == "tiny"
    assert lines["squares"].startswith(("centre crop", "random crop"))
    vqgan, gpt = "16 pixels, 4 x 4 tokens of 32 codes; VQGAN of", "transformer of 2 layers of width 16, "
    assert re.fullmatch(rf"{vqgan} [\d,]+ parameters; {gpt}[\d,]+", lines["sizes"])
    stages = [line.strip() for line in caplog.messages if line.startswith("  stage")]
    assert re.fullmatch(r"stage 1 +200 steps of 4 pictures: about \d+ min, at [\d.e-]+ s a step", stages[0])
    assert re.fullmatch(
        r"stage 2 +at most 300 steps of 4 pictures, after encoding 22 views: about \d+ min, at .* s a step", stages[1]
    )
    assert re.match("all +about", lines["in"])
    assert re.fullmatch(r"[\d.]+ [GM]B at the peak until now, [\d.]+ [GM]B free", lines["memory"])
    assert re.fullmatch(r"\d+ MB in all, [\d.]+ [GM]B free", lines["disk"])
    assert not list((tmp_path / "out" / "work").rglob("*.ckpt"))
    assert not training_folder.saved_settings(tmp_path / "out")
    assert main([*words, *short]) == 0  # with other settings


def test_timing_changes_no_weights_and_no_random_numbers(
    photos: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expectation, "SHORT", 1)
    training = Training(photos, tmp_path / "out", replace(SETTINGS, base=str(tiny_model_folder)))
    training.check()
    training.load_base()
    training_folder.claim(training.out)
    training.pictures = training_folder.unpack_once(training.images, training.out, training.settings)
    training.plan_stages()
    training.build_networks()
    parts = [training.networks.vqgan, training.networks.gpt, training.networks.clip]
    before = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]
    state, modes = torch.get_rng_state(), [part.training for part in parts]
    log_expectation(training)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in parts] == modes
    for part, tensors in zip(parts, before, strict=True):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in part.state_dict().items())


class Slow(Stage):
    def __init__(self):
        super().__init__(FitConfig(batch_size=2, precision="32-true"))
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> Tensor:
        time.sleep(2.0 if self.global_step == 0 else 0.05)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> dict[str, object]:
        return self.learning(adamw(self, self.config, betas=(0.9, 0.95)))


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, number: int) -> Tensor:
        return torch.ones(1)


def test_a_step_is_timed_without_the_first() -> None:
    assert 0.05 <= seconds_per_step(Slow(), Numbers(), Machine()) < 1.5
