"""Progress of a stage: a line with its speed and the time left, and a forecast of how many steps the time allows."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from math import inf

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clip_gen.training.callbacks import TimeLimit, learning_rate

log = logging.getLogger(__name__)

# Shares of the planned steps. Below the first a new model draws only blobs. The example in docs/training.md, which
# draws three of four prompts correctly, had the second.
TOO_FEW, ENOUGH = 0.1, 0.25
MIN_STEPS, MIN_SECONDS = 5, 2.0  # to measure the speed
LATE = 0.3  # of the time, after which fewer steps are enough
TOO_FEW_FOR = {"vqgan": "too few for more than blobs", "gpt": "too few for pictures that suit their prompts"}
STAGE_NAMES = {"vqgan": "the VQGAN", "gpt": "the transformer"}


def stage_title(name: str, stages: Sequence[str]) -> str:
    """Such as "stage 1 of 2: the VQGAN"."""
    return f"stage {stages.index(name) + 1} of {len(stages)}: {STAGE_NAMES[name]}"


class Progress(Callback):
    """Step of total, pictures a second, time left, learning rate and the logged values.

    In a terminal it is one line, written over. Elsewhere it is a log line every `seconds` and one at the end.
    minutes_after: that the stages after this one take, at most with a time limit and about so many without; 0: there
    are none, or their time is not known.
    """

    def __init__(self, name: str, batch_size: int, limit: TimeLimit, minutes_after: float = 0.0, seconds: float = 30.0):
        self.name, self.batch_size, self.limit, self.seconds = name, batch_size, limit, seconds
        self.minutes_after, self.bar, self.terminal = minutes_after, None, ExitStack()
        self.speed = 0.0  # steps a second

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.shown_at, self.shown_step = time.monotonic(), trainer.global_step
        if sys.stderr.isatty() and trainer.is_global_zero:
            self.terminal.enter_context(logging_redirect_tqdm())
            form = "{desc} {n_fmt}/{total_fmt}{postfix}"
            bar = tqdm(desc=self.name, total=trainer.max_steps, bar_format=form, dynamic_ncols=True)
            self.bar = self.terminal.enter_context(bar)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        now, step = time.monotonic(), trainer.global_step
        passed, due = now - self.shown_at, 1.0 if self.bar else self.seconds
        if not trainer.is_global_zero or (passed < due and step < trainer.max_steps and not trainer.should_stop):
            return
        self.speed = (step - self.shown_step) / passed
        logged = "".join(f"  {name} {float(value):.4f}" for name, value in trainer.callback_metrics.items())
        values = f"{self.status(trainer)}  learning rate {learning_rate(trainer):.2g}{logged}"
        if self.bar:
            self.bar.n = step
            self.bar.set_postfix_str(values)
        else:
            log.info("%s %d/%d  %s", self.name, step, trainer.max_steps, values)
        self.shown_at, self.shown_step = now, step

    def status(self, trainer: pl.Trainer) -> str:
        """The speed; the minutes until the last step, or until the time limit and its step if that is sooner; and the
        minutes until the end of the last stage.
        """
        pace = f"{self.speed * self.batch_size:.0f} pictures/s"
        if trainer.should_stop:
            return f"{pace}  0.0 min left"
        left = (trainer.max_steps - trainer.global_step) / self.speed if self.speed else float("inf")
        until = max(0.0, 60 * self.limit.minutes - self.limit.time_elapsed())
        words, seconds = ("at most", until) if self.limit.minutes else ("about", left)
        in_all = f", {words} {seconds / 60 + self.minutes_after:.1f} in all" if self.minutes_after else ""
        if self.limit.minutes and until < left:
            last_step = trainer.global_step + round(self.speed * until)
            return f"{pace}  {until / 60:.1f} min left{in_all}, until about step {last_step}"
        return f"{pace}  {left / 60:.1f} min left{in_all}"

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.terminal.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.terminal.close()


class Forecast(Callback):
    """Logs after the first steps when the stage ends: by its last step, or by its time limit and at about which step.

    title: see stage_title(). minutes: of the stage, 0 without a limit. max_minutes, fine_tunes: see shortage().
    `steps` is how many fit into the minutes: None until then and without a limit. `advice` is that of shortage().
    """

    def __init__(self, name: str, title: str, minutes: float, max_minutes: float, fine_tunes: bool):
        self.name, self.title, self.minutes = name, title, minutes
        self.max_minutes, self.fine_tunes = max_minutes, fine_tunes
        self.steps, self.advice, self.is_logged = None, "", False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first_step, self.began = trainer.global_step, time.monotonic()
        self.seconds_left = 60 * self.minutes * (1 - module.time_spent) or inf

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if self.is_logged:
            return
        done, now = trainer.global_step - self.first_step, time.monotonic()
        if done == 1:
            self.first_step_end = now
        passed, measured = now - self.began, now - self.first_step_end
        is_measured = done >= MIN_STEPS and measured >= MIN_SECONDS
        if not is_measured and passed < LATE * self.seconds_left:
            return
        # The first step is slower than the others, so it counts only when it is the only one.
        pace = measured / (done - 1) if done > 1 else passed
        self.is_logged = True
        self._log(trainer, pace, self.seconds_left - passed)

    def _log(self, trainer: pl.Trainer, pace: float, seconds_left: float) -> None:
        """pace: seconds a step."""
        planned, needed = trainer.max_steps, (trainer.max_steps - trainer.global_step) * pace
        end = f"ends after {planned:,} steps, in about {needed / 60:.2g} minutes"
        if self.minutes:
            self.steps = min(planned, trainer.global_step + max(0, int(seconds_left / pace)))
            self.advice = shortage(self.name, self.steps, planned, self.max_minutes, self.fine_tunes)
            if self.steps < planned:
                end = f"ends by time at about step {self.steps:,} of {planned:,}, after {self.minutes:.3g} minutes"
        if trainer.is_global_zero:
            sentence = f"{self.title}, {end}" + (f": {self.advice}" if self.advice else "")
            log.log(logging.WARNING if self.advice else logging.INFO, "%s", sentence)


def shortage(name: str, steps: int, planned: int, max_minutes: float, fine_tunes: bool) -> str:
    """What too few steps of a stage mean, and what to do; empty if they are enough.

    max_minutes: of the training. fine_tunes: the stage starts from trained weights, which few steps hardly change.
    """
    if steps >= TOO_FEW * planned:
        return ""
    means = "too few, so the model draws worse than its base" if fine_tunes else TOO_FEW_FOR[name]
    minutes = float(f"{max_minutes * ENOUGH * planned / max(steps, 1):.2g}")
    return f"{means}; give max_minutes of about {minutes:,g}, or a smaller size or resolution"
