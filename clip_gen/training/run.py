"""One training run: Lightning's Trainer as every stage here uses it, with progress a person and a log can read."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a stage learns."""

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999  # of the averaged weights that are kept in the end
    compile: bool = False  # torch.compile the network: a minute at the start, then faster; needs a C compiler


class Progress(Callback):
    """A line every so many steps: step of total, what was logged, pictures a second, time left."""

    def __init__(self, name: str, batch_size: int, every: int = 100):
        self.name, self.batch_size, self.every = name, batch_size, every

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began, self.first = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        speed = (step - self.first) / (time.perf_counter() - self.began)
        left = (trainer.max_steps - step) / speed
        values = " ".join(f"{name} {float(value):.4f}" for name, value in trainer.callback_metrics.items())
        rate = speed * self.batch_size
        log.info(
            "%s %d/%d  %s  %.0f pictures/s  %.1f min left", self.name, step, trainer.max_steps, values, rate, left / 60
        )


def fit(
    name: str,
    module: pl.LightningModule,
    config: FitConfig,
    pictures: DataLoader,
    held_back: DataLoader | None,
    folder: Path,
) -> dict[str, object]:
    """Trains to `config.steps`, leaving the averaged weights in the module; returns what to write down about it.

    Checkpoints go to `folder`; when one is there, the run goes on from it.
    """
    began = time.perf_counter()
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_steps=config.steps,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[
            Progress(name, config.batch_size),
            EMAWeightAveraging(decay=config.ema_decay, use_buffers=False),
            ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1000),
        ],
        val_check_interval=min(1000, config.steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    resumed = last if last.is_file() else None
    trainer.fit(module, pictures, held_back, ckpt_path=resumed, weights_only=True)
    metrics = {key: round(float(value), 5) for key, value in trainer.callback_metrics.items()}
    minutes = (time.perf_counter() - began) / 60
    return (
        {"steps": trainer.global_step, "pictures": trainer.global_step * config.batch_size}
        | metrics
        | {
            "minutes": round(minutes, 1),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
    )
