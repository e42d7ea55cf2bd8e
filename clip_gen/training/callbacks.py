"""Lightning callbacks of every stage: random seeds, the time limit, averaged weights, checkpoints and logs on disk."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer, WeightAveraging
from torch import Tensor

from clip_gen.files import write_text_atomic
from clip_gen.training.checkpoints import LAST, PREVIOUS, DamagedError, read_checkpoint, save_checkpoint
from clip_gen.training.interrupts import Interrupts
from clip_gen.training.stage import FitConfig, Stage

log = logging.getLogger(__name__)

HISTORY_LINES = 500  # about so many lines of losses per stage


class ReseedEachBatch(Callback):
    """Seeds torch for every batch from (seed, step, rank), so a resumed stage draws the same random numbers."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        # The rank is part of the seed: processes must not all drop out the same neurons.
        torch.manual_seed(((self.seed * 1_000_003 + trainer.global_step) * 4099 + trainer.global_rank) % 2**63)


class TimeLimit(Timer):
    """Ends the stage after `minutes` of training (0: no limit) and tells the stage which share of them has passed.

    Lightning's Timer saves the elapsed time in the checkpoint, so a resumed stage has only the rest of its minutes.
    """

    state_key = "Deadline"  # the key in checkpoints of earlier versions

    def __init__(self, name: str, minutes: float):
        super().__init__()
        self.name, self.minutes = name, minutes

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.global_step and trainer.is_global_zero:
            message = "%s: resumed from step %d of %d, after %.1f minutes"
            log.info(message, self.name, trainer.global_step, trainer.max_steps, self.time_elapsed() / 60)
        self._update(trainer, module)
        self._stop_when_over(trainer, module)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self._update(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self._stop_when_over(trainer, module)

    def _update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.minutes:
            # All processes use the clock of the first: the learning rate must be the same in each.
            module.time_spent = trainer.strategy.broadcast(self.time_elapsed() / (60 * self.minutes))

    def _stop_when_over(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if module.time_spent >= 1:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.info("%s: %.1f minutes are over at step %d", self.name, self.minutes, trainer.global_step)


class EMA(WeightAveraging):
    """An exponential moving average of the weights.

    At first it covers the last ninth of the steps so far: with the full decay from the start, the average of a short
    training would still be close to the initial weights.
    """

    state_key = "Averaging"  # the key in checkpoints of earlier versions

    def __init__(self, decay: float):
        def average(averages: list[Tensor], weights: list[Tensor], steps: Tensor) -> None:
            # One call for all tensors: one call each would launch hundreds of kernels on a GPU.
            torch._foreach_lerp_(averages, weights, max(9 / (10 + int(steps)), 1 - decay))

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the stage itself is still on the CPU
        super().setup(trainer, pl_module, stage)

    def weights(self) -> dict[str, Tensor]:
        """The averages, by the names of the stage's state_dict."""
        return self._average_model.module.state_dict()


class KeepBest(EarlyStopping):
    """Saves the averaged weights with the lowest validation loss, and ends the stage after `patience` validations
    without a lower one.
    """

    def __init__(self, path: Path, ema: EMA, patience: int):
        super().__init__("val_loss", patience=patience, check_finite=False)
        self.path, self.ema = path, ema

    @property
    def out_of_patience(self) -> bool:
        return self.wait_count >= self.patience

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # The training may have been interrupted after it had decided to stop.
        trainer.should_stop = trainer.should_stop or self.out_of_patience

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, module)
        if self.wait_count == 0 and trainer.is_global_zero:
            values = {"val_loss": float(self.best_score), "step": trainer.global_step}
            save_checkpoint({"state_dict": self.ema.weights(), **values}, self.path)
        if self.out_of_patience:
            log.info("the validation loss has not improved in %d validations: done", self.wait_count)

    def restore(self, stage: Stage) -> dict[str, float]:
        """Loads the best weights into the stage and returns their loss and step; without a usable file the last
        weights stay and the result is empty.
        """
        if not self.path.is_file():
            return {}
        try:
            best = read_checkpoint(self.path)
        except DamagedError as error:
            log.warning("%s; the last weights are used instead of the best", error)
            return {}
        stage.load_state_dict(best["state_dict"])
        return {"val_loss": round(best["val_loss"], 5), "best_step": best["step"]}


class SaveCheckpoints(Callback):
    """Writes last.ckpt every `seconds`, at the end, and at once when a signal is to end the training.

    Slow writes make it less frequent, to at most ten times `seconds`. At a step with a validation it writes after the
    validation: a stage that resumed from before it would not validate again.
    """

    def __init__(self, folder: Path, seconds: float, validate_every: int, interrupts: Interrupts):
        self.folder, self.seconds, self.validate_every = folder, seconds, validate_every
        self.interrupts = interrupts

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved_at, self.write_seconds = time.monotonic(), 0.0
        path = trainer.ckpt_path
        if trainer.is_global_zero and path and Path(path).name == PREVIOUS:
            # Every process has read it by now. The next checkpoint must not replace it.
            os.replace(path, self.folder / LAST)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % self.validate_every:
            self._save_when_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save_when_due(trainer)

    def _save_when_due(self, trainer: pl.Trainer) -> None:
        interval = max(self.seconds, min(19 * self.write_seconds, 10 * self.seconds))
        due = time.monotonic() - self.saved_at >= interval
        if trainer.strategy.reduce_boolean_decision(due or bool(self.interrupts.number), all=False):
            self._save(trainer)
            self.interrupts.end(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_at = time.monotonic()
        self.write_seconds = self.saved_at - began


class History(Callback):
    """history.jsonl: a line of JSON with the logged values, about HISTORY_LINES per stage, for the report's curves."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.interval = max(1, trainer.max_steps // HISTORY_LINES)
        # Steps after the checkpoint are trained again.
        kept = [entry for entry in read_history(self.path) if entry["step"] <= trainer.global_step]
        if trainer.is_global_zero:
            write_text_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % self.interval == 0:
            self._write(trainer, validation=False)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(trainer, validation=True)

    def _write(self, trainer: pl.Trainer, validation: bool) -> None:
        if not trainer.is_global_zero:
            return
        values = {
            name: round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val_") == validation
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")


def read_history(path: Path) -> list[dict]:
    """The entries of history.jsonl; empty without the file. Lines that a crash damaged are skipped."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


class StartLog(Callback):
    """ledger.json: one entry for each time the stage was started or resumed, with its steps, minutes and settings."""

    def __init__(self, path: Path, config: FitConfig):
        self.path, self.config = path, config

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = time.perf_counter()
        self.from_step = trainer.global_step
        self.earlier = [start for start in read_starts(self.path) if start["from_step"] < self.from_step]
        for start in self.earlier:  # steps after the checkpoint were lost
            start["to_step"] = min(start["to_step"], self.from_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % 50 == 0:
            self._write(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or trainer.global_step == self.from_step:
            return
        minutes = round((time.perf_counter() - self.began) / 60, 2)
        start = {"from_step": self.from_step, "to_step": trainer.global_step, "minutes": minutes}
        write_text_atomic(self.path, json.dumps([*self.earlier, start | {"fit": asdict(self.config)}]))


def read_starts(path: Path) -> list[dict]:
    """The entries of ledger.json; empty without the file."""
    return json.loads(path.read_text()) if path.is_file() else []


class Clock(Callback):
    """clock.json: the minutes of a training over all its starts, saved with every checkpoint. Time after the last
    checkpoint does not count, just as the checkpoint does not contain it.

    work: the folder with the stages' folders. began: when this start began, by time.monotonic.
    """

    def __init__(self, work: Path, stages: Sequence[str], began: float):
        self.path, self.began = work / "clock.json", began
        if self.path.is_file():
            saved = json.loads(self.path.read_text())
            self.before, self.outside = saved["minutes"], saved["outside"]
        else:  # earlier versions wrote none
            starts = [start for stage in stages for start in read_starts(work / stage / "ledger.json")]
            self.before, self.outside = sum(start["minutes"] for start in starts), {}

    @property
    def minutes_here(self) -> float:
        """Minutes since this start."""
        return (time.monotonic() - self.began) / 60

    @property
    def minutes(self) -> float:
        """Minutes of all starts."""
        return self.before + self.minutes_here

    def spent_outside(self, stage: str) -> float:
        """Minutes of all starts without those in which the stage trained; to be called just before it starts or
        resumes.
        """
        earlier = self.outside.get(stage, self.before)
        self.outside[stage] = earlier + self.minutes_here
        self.save()
        return self.outside[stage]

    def save(self) -> None:
        if not rank_zero_only.rank:
            write_text_atomic(self.path, json.dumps({"minutes": round(self.minutes, 4), "outside": self.outside}))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self.save()
