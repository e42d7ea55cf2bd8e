"""One training run: Lightning's Trainer as every stage here uses it, with progress a person and a log can read."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from clip_gen.files import whole_or_not

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


class Ledger(Callback):
    """ledger.json beside the checkpoints: one entry for each time the stage was started, with what it was told.

    What a record says of a training that was cut off and taken up again, perhaps with other settings, comes from here.
    """

    def __init__(self, path: Path, config: FitConfig):
        self.path, self.config = path, config

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = time.perf_counter()
        self.earlier = [leg for leg in read_ledger(self.path) if leg["from_step"] < trainer.global_step]
        for leg in self.earlier:
            # What came after the checkpoint was lost.
            leg["to_step"] = min(leg["to_step"], trainer.global_step)
        self.from_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % 50 and trainer.global_step != trainer.max_steps:
            return
        minutes = round((time.perf_counter() - self.began) / 60, 2)
        leg = {"from_step": self.from_step, "to_step": trainer.global_step, "minutes": minutes}
        with whole_or_not(self.path) as temporary:
            Path(temporary).write_text(json.dumps([*self.earlier, leg | {"fit": asdict(self.config)}]))


def read_ledger(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.is_file() else []


def fit(
    name: str,
    module: pl.LightningModule,
    config: FitConfig,
    pictures: Callable[[int], DataLoader],
    held_back: DataLoader | None,
    folder: Path,
) -> dict[str, object]:
    """Trains to `config.steps`, leaving the averaged weights in the module; returns what to write down about it.

    pictures: the batches from a step on. Checkpoints go to `folder`; when one is there, the run goes on from it.
    """
    last = folder / "last.ckpt"
    done = checkpointed_steps(last)
    trainer = pl.Trainer(
        max_steps=config.steps,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[
            Progress(name, config.batch_size),
            Ledger(folder / "ledger.json", config),
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
    if done < config.steps:
        trainer.fit(module, pictures(done), held_back, ckpt_path=last if done else None, weights_only=True)
    else:
        # Lightning would do nothing, not even put the averaged weights in place; the checkpoint holds them.
        module.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
    legs = read_ledger(folder / "ledger.json")
    return {
        "steps": max(done, trainer.global_step),
        **{key: round(float(value), 5) for key, value in trainer.callback_metrics.items()},
        "minutes": round(sum(leg["minutes"] for leg in legs), 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "legs": legs,
    }


def checkpointed_steps(path: Path) -> int:
    """How far the checkpoint came; 0 without one."""
    return int(torch.load(path, weights_only=True, mmap=True)["global_step"]) if path.is_file() else 0
