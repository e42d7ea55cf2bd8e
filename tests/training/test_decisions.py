"""training/decisions.py: stage 1 uses LPIPS if it was pulled, else features of CLIP."""

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
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.training import decisions
from clip_gen.training.decisions import choose_lpips
from clip_gen.training.job import Training
from clip_gen.training.losses import perceptual_distance
from clip_gen.training.plan import TrainSettings
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANLoss, VQGANTrainer, half
from clip_gen.weights.model_folder import load_part

BATCH = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def _lpips(lpips_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_LPIPS", str(lpips_folder))


def trained(photos: Path, base: Path, out: Path, **settings: object) -> dict[str, object]:
    """The record of stage 1 in training.json."""
    toy = TrainSettings(
        stage="vqgan", base=str(base), vqgan_steps=2, batch_size=4, precision="32-true", adversarial_weight=0.0
    )
    Training(photos, out, replace(toy, **settings)).run()
    return json.loads((out / "model" / "training.json").read_text())["stages"]["vqgan"]


def no_distance(*_: object) -> Tensor:
    raise AssertionError("the other distance was used")


def test_a_training_uses_lpips_if_it_was_pulled_and_else_clip(
    photos: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    lpips_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    unused = {"CLIP": (FrozenLPIPS, "forward"), "LPIPS": (ClipEncoder, "feature_maps")}
    for name in ("CLIP", "LPIPS"):
        with monkeypatch.context() as patched:
            patched.setattr(*unused[name], no_distance)
            record = trained(photos, tiny_model_folder, tmp_path / name)
        assert record["perceptual_loss"] == name
        assert f"<td>perceptual_loss</td><td>{name}</td>" in (tmp_path / name / "report.html").read_text()
        monkeypatch.setenv("CLIP_GEN_LPIPS", str(lpips_folder))
    clip, lpips = (line for line in caplog.messages if line.startswith("perceptual loss: "))
    assert "features of CLIP" in clip
    assert "python -m clip_gen pull lpips" in clip
    assert lpips.startswith("perceptual loss: LPIPS, of ")
    saved = torch.load(tmp_path / "LPIPS" / "work" / "vqgan" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "lpips" in name or "lin0" in name]


@pytest.mark.usefixtures("_lpips")
def test_without_a_perceptual_loss_neither_is_used(
    photos: Path, tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert "perceptual_loss" not in trained(photos, tiny_model_folder, tmp_path, perceptual_weight=0.0)
    assert "perceptual loss" not in caplog.text


def trainer(weight: float) -> VQGANTrainer:
    """With LPIPS and no CLIP."""
    stage = VQGANTrainer(
        tiny_networks().vqgan.requires_grad_(True), FitConfig(), VQGANLoss(perceptual=weight), loaded()
    )
    stage.logged = {}
    stage.log_dict = lambda values, **_: stage.logged.update(values)
    return stage


def loaded() -> FrozenLPIPS:
    lpips = FrozenLPIPS()
    load_part(lpips, decisions.lpips_weights())
    return lpips


@pytest.mark.usefixtures("_lpips")
def test_lpips_adds_its_weight_times_the_distance_to_the_loss() -> None:
    without, with_lpips = trainer(0.0), trainer(3.0)
    for stage in (without, with_lpips):
        stage.training_step(BATCH)
    losses = [float(stage.logged["loss"]) for stage in (without, with_lpips)]
    images = from_bytes(BATCH)
    distance = float(perceptual_distance(loaded(), half(without.vqgan(images).images), half(images)).detach())
    assert distance > 0.01
    assert float(with_lpips.logged["perceptual"].detach()) == pytest.approx(distance, rel=1e-3)
    assert losses[1] - losses[0] == pytest.approx(3 * distance, rel=1e-3)


@pytest.mark.usefixtures("_lpips")
def test_gradients_of_lpips_reach_the_vqgan_but_not_lpips() -> None:
    without, stage = trainer(0.0), trainer(1.0)
    for one in (without, stage):
        one.vqgan.train()
        one.training_step(BATCH).backward()
    for name in ("decoder.conv_out", "decoder.conv_in", "encoder.conv_in"):
        plain, gradient = (one.vqgan.get_submodule(name).weight.grad for one in (without, stage))
        assert gradient.isfinite().all()
        assert not torch.allclose(gradient, plain, rtol=1e-3)
    assert all(parameter.grad is None for parameter in stage.frozen[0].parameters())
    assert {id(p) for p in stage.frozen[0].parameters()}.isdisjoint(id(p) for p in stage.parameters())


@pytest.mark.usefixtures("_lpips")
def test_a_resumed_training_keeps_its_perceptual_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_lpips(tmp_path / "a", 16) is not None
    folder = decisions.lpips_weights().parent
    monkeypatch.setenv("CLIP_GEN_LPIPS", "nowhere")
    with pytest.raises(
        ValueError, match=r"nowhere/lpips\.safetensors: missing or damaged; this training began with LPIPS"
    ):
        choose_lpips(tmp_path / "a", 16)
    assert choose_lpips(tmp_path / "b", 16) is None
    monkeypatch.setenv("CLIP_GEN_LPIPS", str(folder))
    assert choose_lpips(tmp_path / "b", 16) is None


@pytest.mark.usefixtures("_lpips")
def test_pictures_too_small_for_lpips_use_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose_lpips(tmp_path, 12) is None
    assert "on pictures of 16 pixels and more" in caplog.text


def test_a_damaged_lpips_file_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpips.safetensors").write_bytes(b"something else")
    monkeypatch.setenv("CLIP_GEN_LPIPS", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"lpips\.safetensors: missing or damaged; .* run .*python -m clip_gen pull lpips"
    ):
        choose_lpips(tmp_path / "stage", 16)


def test_lpips_is_by_default_where_pull_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIP_GEN_LPIPS")
    assert decisions.lpips_weights() == ROOT / "checkpoints" / "lpips" / "lpips.safetensors"
    assert TINY.vqgan.resolution >= decisions.MIN_SIDE  # or these tests would use CLIP
