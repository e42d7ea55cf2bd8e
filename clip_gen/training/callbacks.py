"""Lightning callbacks of every stage: random seeds, the time limit, averaged weights, checkpoints and the history."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer, WeightAveraging
from torch import Tensor

from clip_gen.files import write_text_atomic
from clip_gen.training.checkpoints import LAST, DamagedError, read_checkpoint, save_checkpoint
from clip_gen.training.interrupts import handle_signals, ignore_further_signals
from clip_gen.training.loggers import log_values
from clip_gen.training.stage import Stage

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
    """Ends the stage after `minutes` of training (0: no limit) and sets the stage's `time_spent`.

    Lightning's Timer saves the elapsed time in the checkpoint, so a resumed stage has only the rest of its minutes.
    """

    state_key = "Deadline"  # the key in checkpoints of earlier versions

    def __init__(self, name: str, minutes: float):
        super().__init__()
        self.name, self.minutes = name, minutes
        self.from_step, self.earlier = 0, []

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        self.earlier = checkpoint.get("starts", [])  # earlier versions saved none
        self.from_step = checkpoint["global_step"] if self.earlier else 0

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["starts"] = self.starts(trainer.global_step)

    def starts(self, step: int) -> list[dict[str, float]]:
        """The steps and minutes of each start of the stage until this step. Steps that were lost do not count."""
        if step == self.from_step:
            return self.earlier
        minutes = self.time_elapsed() / 60 - sum(start["minutes"] for start in self.earlier)
        return [*self.earlier, {"from_step": self.from_step, "to_step": step, "minutes": round(minutes, 2)}]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.global_step and trainer.is_global_zero:
            message = "%s: resumed from step %d of %d, after %.1f minutes"
            log.info(message, self.name, trainer.global_step, trainer.max_steps, self.time_elapsed() / 60)
        self._update(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self._update(trainer, module)

    def _update(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.minutes:
            # All processes use the clock of the first: the learning rate must be the same in each.
            module.time_spent = trainer.strategy.broadcast(self.time_elapsed() / (60 * self.minutes))
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
        return {"val_loss": round(best["val_loss"], 6), "best_step": best["step"]}


class SaveCheckpoints(Callback):
    """Writes last.ckpt every `seconds` and at the end. After the first step a signal ends the stage with a checkpoint.

    Slow writes make it less frequent, to at most ten times `seconds`. At a step with a validation it writes after the
    validation: a stage that resumed from before it would not validate again.
    """

    def __init__(self, name: str, folder: Path, seconds: float, validate_every: int):
        self.name, self.folder, self.seconds, self.validate_every = name, folder, seconds, validate_every
        self.signal = 0  # the number of the signal that was received

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved_at, self.write_seconds, self.first_step = time.monotonic(), 0.0, trainer.global_step
        if trainer.world_size > 1:
            handle_signals(self._received)  # Lightning's handler would broadcast while it handles the signal

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step == self.first_step + 1:  # before, there was nothing to save
            handle_signals(self._received)  # Lightning restores the handlers when it ends
        if trainer.global_step % self.validate_every:
            self._save_when_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save_when_due(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save_when_due(self, trainer: pl.Trainer) -> None:
        interval = max(self.seconds, min(19 * self.write_seconds, 10 * self.seconds))
        due = bool(self.signal) or time.monotonic() - self.saved_at >= interval
        if not trainer.strategy.reduce_boolean_decision(due, all=False):
            return
        self._save(trainer)
        if trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
            number = self.signal or signal.SIGTERM  # of another process
            message = "%s: ended by %s; the checkpoint of step %d is saved"
            if trainer.is_global_zero:
                log.info(message, self.name, signal.Signals(number).name, trainer.global_step)
            raise SystemExit(128 + number)

    def _save(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_at = time.monotonic()
        self.write_seconds = self.saved_at - began

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            ignore_further_signals()
        self.signal = number
        if not rank_zero_only.rank:
            message = f"\n{self.name}: {signal.Signals(number).name}: saving a checkpoint; Ctrl-C ends at once\n"
            with suppress(OSError):  # a closed terminal
                os.write(2, message.encode())  # a handler must not use sys.stderr, which it may have interrupted


class History(Callback):
    """history.jsonl: a line of JSON with the logged values, about HISTORY_LINES per stage, for the report's curves."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.interval = history_interval(trainer.max_steps)
        # Steps after the checkpoint are trained again.
        kept = [entry for entry in read_history(self.path) if entry["step"] <= trainer.global_step]
        if trainer.is_global_zero:
            write_text_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % self.interval == 0:
            self._write(trainer, validation=False)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(trainer, validation=True)

    def last_values(self, trainer: pl.Trainer) -> dict[str, float]:
        """The last value of everything that was logged, also before this start."""
        logged = {name: value for entry in read_history(self.path) for name, value in entry.items()}
        return {
            name: round(float(value), 6)
            for name, value in (logged | trainer.callback_metrics).items()
            if name not in ("step", "learning_rate")
        }

    def _write(self, trainer: pl.Trainer, validation: bool) -> None:
        logged = {
            name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_") == validation
        }
        if trainer.is_global_zero:
            values = {name: round(float(value), 6) for name, value in logged.items()}
            if not validation:
                values["learning_rate"] = float(f"{learning_rate(trainer):.4g}")
                log_values(trainer.loggers, trainer.global_step, {"learning_rate": values["learning_rate"]})
            append_history(self.path, trainer.global_step, values)


def history_interval(steps: int) -> int:
    """Steps between two lines of the history of a stage of so many steps."""
    return max(1, steps // HISTORY_LINES)


def append_history(path: Path, step: int, values: Mapping[str, float]) -> None:
    """Appends a line to history.jsonl. Processes beside the first must not."""
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def learning_rate(trainer: pl.Trainer) -> float:
    """AdamW's, also beside Muon."""
    return trainer.optimizers[0].param_groups[-1]["lr"]


def read_history(path: Path) -> list[dict]:
    """The entries of history.jsonl; empty without the file. Lines that a crash damaged are skipped."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries
