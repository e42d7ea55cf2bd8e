"""Writes the report of a training while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from clip_gen.training.callbacks import TimeLimit
from clip_gen.training.progress import Forecast, Progress
from clip_gen.training.report import RENEWED_EVERY, RUNNING

Write = Callable[[Mapping[str, object], list[str], str], None]


class LiveReport(Callback):
    """Has the report written at the start of a stage, every `seconds`, and when the stage is interrupted.

    If writing is slow it happens less often, so that it takes at most a twentieth of the time.
    write: gets the stage's record so far, warnings, and a sentence on how far the training is.
    """

    def __init__(self, forecast: Forecast, write: Write, seconds: float = RENEWED_EVERY):
        self.forecast, self.write, self.seconds = forecast, write, seconds
        self.written_at, self.write_seconds = 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(trainer, f"{RUNNING}: {self.forecast.title}, from step {trainer.global_step:,} on.")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if time.monotonic() - self.written_at >= max(self.seconds, 19 * self.write_seconds):
            (progress,) = (one for one in trainer.callbacks if isinstance(one, Progress))
            how_far = f"step {trainer.global_step:,} of {trainer.max_steps:,}, {progress.status(trainer)}"
            self._write(trainer, f"{RUNNING}: {self.forecast.title}, {how_far}.")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        title, step = self.forecast.title, trainer.global_step
        with suppress(OSError):  # it must not hide the exception
            self._write(trainer, f"Interrupted in {title}, at step {step:,}. The same command resumes the training.")

    def _write(self, trainer: pl.Trainer, sentence: str) -> None:
        if not trainer.is_global_zero:
            return
        began = time.monotonic()
        (limit,) = (one for one in trainer.callbacks if isinstance(one, TimeLimit))
        values = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        values |= {"steps": trainer.global_step, "planned_steps": trainer.max_steps, "precision": trainer.precision}
        values["minutes"] = sum(start["minutes"] for start in limit.earlier)
        self.write(values, [self.forecast.advice] if self.forecast.advice else [], sentence)
        self.written_at = time.monotonic()
        self.write_seconds = self.written_at - began
