"""training/loggers.py: curves and samples in CSV files, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

from clip_gen.files import ROOT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training import loggers
from clip_gen.training.fit import Machine, fit
from clip_gen.training.grids import ReconstructionGrids
from clip_gen.training.loggers import build_loggers, logger_names
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.worlds.shapes.pairs import RenderedPictures


def test_csv_is_written_by_default_and_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, names in (({"csv"}, ["csv"]), ({"csv", "tensorboardX", "wandb"}, ["csv", "tensorboard"])):
        monkeypatch.setattr(loggers, "find_spec", lambda name, known=installed: name in known)
        assert logger_names("auto") == names
    assert logger_names("none") == []
    assert logger_names("csv, wandb") == ["csv", "wandb"]


def test_unknown_and_missing_loggers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: name == "csv")
    with pytest.raises(ValueError, match="loggers has wandb, which is not installed: pip install wandb"):
        logger_names("csv,wandb")
    with pytest.raises(ValueError, match='loggers is "csv;wandb"; give auto, none, or some of csv, tensorboard, wandb'):
        logger_names("csv;wandb")


def train(out: Path, text: str) -> None:
    torch.manual_seed(0)
    stage = VQGANTrainer(VQGAN(TINY.vqgan).train(), FitConfig(steps=4, batch_size=4, validate_every=2))
    held_back = RenderedPictures(4, 2, 16)
    folder = out / "work" / "vqgan"
    folder.mkdir(parents=True)
    grids = ReconstructionGrids(held_back, folder)
    beside = {"callbacks": [grids], "loggers": build_loggers(text, "vqgan", out), "machine": Machine()}
    fit("vqgan", stage, RenderedPictures(100, 0, 16), held_back, folder, seed=0, **beside)


def test_a_csv_file_has_the_curves(tmp_path: Path) -> None:
    train(tmp_path, "csv")
    with (tmp_path / "work" / "logs" / "csv" / "vqgan" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"step", "loss", "l1", "val_psnr", "learning_rate"} <= set(rows[0])
    assert sum(bool(row["val_psnr"]) for row in rows) == 2
    assert sum(bool(row["loss"]) for row in rows) == 4


def test_tensorboard_has_curves_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "work" / "logs" / "tensorboard" / "vqgan")).Reload()
    assert {"loss", "val_psnr", "learning_rate"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("loss")) == 4
    assert events.Tags()["images"] == ["samples"]
    assert {0, 4} <= {event.step for event in events.Images("samples")}


@pytest.mark.parametrize(
    ("module", "packages"),
    # torchmetrics imports Matplotlib where it is installed, and Lightning imports torchmetrics.
    [("curves", {"matplotlib", "torch"}), ("cli", {"tensorboard", "tensorboardX", "wandb"})],
)
def test_importing_loads_no_logger_and_no_plotting(module: str, packages: set[str]) -> None:
    code = f"import sys, clip_gen.training.{module}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(loaded.stdout.split()) & packages
