"""training/perceptual.py: stage 1 compares by LPIPS where it is, else by CLIP, and says so."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_networks
from torch import Tensor

from clip_gen.files import ROOT
from clip_gen.images import from_bytes
from clip_gen.training import perceptual, vqgan_trainer
from clip_gen.training.job import Training
from clip_gen.training.losses import lpips_distance
from clip_gen.training.perceptual import choose_lpips
from clip_gen.training.plan import TrainSettings
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANLoss, VQGANTrainer

BATCH = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def _lpips(lpips_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_LPIPS", str(lpips_folder))


def trained(photos: Path, base: Path, out: Path, **settings: object) -> dict[str, object]:
    """What training.json says of stage 1."""
    told = TrainSettings(
        stage="vqgan", base=str(base), vqgan_steps=2, batch_size=4, precision="32-true", adversarial_weight=0.0
    )
    Training(photos, out, replace(told, **settings)).run()
    return json.loads((out / "model" / "training.json").read_text())["stages"]["vqgan"]


def no_distance(*_: object) -> Tensor:
    raise AssertionError("the other distance was asked for")


@pytest.mark.usefixtures("_lpips")
def test_a_training_takes_lpips_where_it_is_and_says_so(
    photos: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(vqgan_trainer, "perceptual_distance", no_distance)
    with caplog.at_level(logging.INFO):
        record = trained(photos, tiny_model_folder, tmp_path)
    assert record["perceptual_loss"] == "LPIPS"
    assert any(line.startswith("perceptual loss: LPIPS, of ") for line in caplog.messages)
    assert "<td>perceptual_loss</td><td>LPIPS</td>" in (tmp_path / "report.html").read_text()
    saved = torch.load(tmp_path / "work" / "vqgan" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "lpips" in name or "lin0" in name]


def test_a_training_without_lpips_takes_clip_and_says_how_to_get_it(
    photos: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(vqgan_trainer, "lpips_distance", no_distance)
    with caplog.at_level(logging.INFO):
        record = trained(photos, tiny_model_folder, tmp_path)
    assert record["perceptual_loss"] == "CLIP"
    (line,) = (line for line in caplog.messages if line.startswith("perceptual loss: "))
    assert "features of CLIP" in line
    assert "python -m clip_gen pull lpips" in line


@pytest.mark.usefixtures("_lpips")
def test_a_training_without_a_perceptual_loss_asks_for_neither(
    photos: Path, tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert "perceptual_loss" not in trained(photos, tiny_model_folder, tmp_path, perceptual_weight=0.0)
    assert "perceptual loss" not in caplog.text


def trainer(weight: float) -> VQGANTrainer:
    """With LPIPS and no CLIP."""
    made = VQGANTrainer(
        tiny_networks().vqgan.requires_grad_(True), FitConfig(), VQGANLoss(perceptual=weight), lpips=loaded()
    )
    made.logged = {}
    made.log_means = lambda values, _: made.logged.update(values)
    return made


def loaded() -> torch.nn.Module:
    return perceptual._load(perceptual.lpips_weights())


@pytest.mark.usefixtures("_lpips")
def test_the_loss_is_that_without_lpips_and_its_weight_times_the_distance() -> None:
    without, with_lpips = trainer(0.0), trainer(3.0)
    losses = [float(stage.training_step(BATCH).detach()) for stage in (without, with_lpips)]
    images = from_bytes(BATCH)
    distance = float(lpips_distance(loaded(), without.vqgan(images).images, images).detach())
    assert distance > 0.01
    assert float(with_lpips.logged["perceptual"].detach()) == pytest.approx(distance, rel=1e-3)
    assert losses[1] - losses[0] == pytest.approx(3 * distance, rel=1e-3)


@pytest.mark.usefixtures("_lpips")
def test_its_gradient_reaches_the_encoder_and_the_decoder_and_not_lpips_itself() -> None:
    stage = trainer(1.0)
    stage.vqgan.train()
    stage.training_step(BATCH)
    stage.logged["perceptual"].backward()  # of that part alone
    for layer in (stage.vqgan.decoder.conv_out, stage.vqgan.decoder.conv_in, stage.vqgan.encoder.conv_in):
        assert layer.weight.grad.isfinite().all()
        assert layer.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in stage.lpips().parameters())
    assert {id(p) for p in stage.lpips().parameters()}.isdisjoint(id(p) for p in stage.parameters())


@pytest.mark.usefixtures("_lpips")
def test_a_training_goes_on_with_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_lpips(tmp_path / "a", 16) is not None
    folder = perceptual.lpips_weights().parent
    monkeypatch.setenv("CLIP_GEN_LPIPS", "nowhere")
    with pytest.raises(ValueError, match=r"nowhere/lpips\.safetensors: missing, and this training began with"):
        choose_lpips(tmp_path / "a", 16)
    assert choose_lpips(tmp_path / "b", 16) is None
    monkeypatch.setenv("CLIP_GEN_LPIPS", str(folder))
    assert choose_lpips(tmp_path / "b", 16) is None
    assert "this training began with them" in caplog.messages[-1]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "last.ckpt").touch()  # of before there was LPIPS: nothing is noted
    assert choose_lpips(tmp_path / "old", 16) is None


@pytest.mark.usefixtures("_lpips")
def test_pictures_too_small_for_lpips_are_compared_by_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose_lpips(tmp_path, 12) is None
    assert "LPIPS takes pictures of 16 pixels and more" in caplog.text


def test_a_file_that_is_no_lpips_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpips.safetensors").write_bytes(b"something else")
    monkeypatch.setenv("CLIP_GEN_LPIPS", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"lpips\.safetensors: is not LPIPS as pull leaves it .* get it again by python -m clip_gen"
    ):
        choose_lpips(tmp_path / "stage", 16)


def test_without_a_name_it_is_looked_for_where_it_is_pulled_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIP_GEN_LPIPS")
    assert perceptual.lpips_weights() == ROOT / "checkpoints" / "lpips" / "lpips.safetensors"
    assert TINY.vqgan.resolution >= perceptual.MIN_SIDE  # or these tests would compare by CLIP
