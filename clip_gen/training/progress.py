"""Progress of a stage: a line with its speed and the time left, and a forecast of how many steps the time allows."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

# Shares of the planned steps. Below the first a new model draws only blobs. The README's model, which draws three of
# four prompts correctly, had the second.
TOO_FEW, ENOUGH = 0.1, 0.25
MIN_STEPS, MIN_SECONDS = 5, 2.0  # to measure the speed
# On slow machines fewer steps are enough: two after the first once SOON of the time has passed, any once LATE has.
SOON, LATE = 0.1, 0.3
TOO_FEW_FOR = {"vqgan": "too few for more than blobs", "gpt": "too few for pictures that suit their prompts"}


class Progress(Callback):
    """Step of total, pictures a second, time left, learning rate and the logged values.

    In a terminal it is one line, written over. Elsewhere it is a log line every `seconds` and one at the end.
    """

    def __init__(self, name: str, batch_size: int, seconds: float = 30.0):
        self.name, self.batch_size, self.seconds = name, batch_size, seconds
        self.bar, self.terminal = None, ExitStack()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = self.shown_at = time.monotonic()
        self.shown_step, self.spent_before = trainer.global_step, module.time_spent
        if sys.stderr.isatty() and trainer.is_global_zero:
            self.terminal.enter_context(logging_redirect_tqdm())
            form = "{desc} {n_fmt}/{total_fmt}{postfix}"
            steps = {"initial": trainer.global_step, "total": trainer.max_steps}
            self.bar = self.terminal.enter_context(tqdm(desc=self.name, bar_format=form, dynamic_ncols=True, **steps))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        now, step = time.monotonic(), trainer.global_step
        passed, due = now - self.shown_at, 1.0 if self.bar else self.seconds
        if not trainer.is_global_zero or (passed < due and step < trainer.max_steps and not trainer.should_stop):
            return
        speed = (step - self.shown_step) / passed
        rate = trainer.optimizers[0].param_groups[-1]["lr"]  # AdamW's, also beside Muon
        logged = "".join(f"  {name} {float(value):.4f}" for name, value in trainer.callback_metrics.items())
        left = self._left(trainer, module.time_spent, now, speed)
        values = f"{speed * self.batch_size:.0f} pictures/s  {left}  lr {rate:.2g}{logged}"
        if self.bar:
            self.bar.n = step
            self.bar.set_postfix_str(values)
        else:
            log.info("%s %d/%d  %s", self.name, step, trainer.max_steps, values)
        self.shown_at, self.shown_step = now, step

    def _left(self, trainer: pl.Trainer, spent: float, now: float, speed: float) -> str:
        """Minutes until the last step, or until the time limit and its step if that is sooner."""
        if trainer.should_stop:
            return "0.0 min left"
        left = (trainer.max_steps - trainer.global_step) / speed if speed else float("inf")
        if spent > self.spent_before:
            until = (now - self.began) * max(0.0, 1 - spent) / (spent - self.spent_before)
            if until < left:
                return f"{until / 60:.1f} min left, until about step {trainer.global_step + round(speed * until)}"
        return f"{left / 60:.1f} min left"

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.terminal.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.terminal.close()


@dataclass(frozen=True)
class Reach:
    """A number of steps of a stage, out of `planned`, in a training of max_minutes.

    fine_tunes: the stage starts from trained weights, which few steps hardly change. remedy: what helps besides more
    minutes, as the end of a sentence.
    """

    stage: str
    steps: int
    planned: int
    max_minutes: float
    fine_tunes: bool = False
    remedy: str = ""

    @property
    def too_few(self) -> bool:
        return self.steps < TOO_FEW * self.planned

    def advice(self) -> str:
        """What too few steps mean, and what to do."""
        means = "too few to change much of the base model" if self.fine_tunes else TOO_FEW_FOR[self.stage]
        minutes = enough_minutes(self.max_minutes, self.steps, ENOUGH * self.planned)
        return f"{means}; give max_minutes of about {minutes}{self.remedy}"


def enough_minutes(max_minutes: float, reached: float, wanted: float) -> str:
    """The minutes needed for `wanted` when max_minutes allow `reached`, to two digits."""
    return f"{float(f'{max_minutes * wanted / max(reached, 1):.2g}'):,g}"


class Forecast(Callback):
    """Logs after the first steps how many steps the stage's minutes allow; nothing without a time limit.

    `reach` is None until then.
    """

    def __init__(self, minutes: float, planned: Reach):
        self.seconds, self.planned, self.reach = 60 * minutes, planned, None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first_step, self.began = trainer.global_step, time.monotonic()
        self.seconds_left = self.seconds * (1 - module.time_spent)
        self.first_step_end = self.began

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        done, now = trainer.global_step - self.first_step, time.monotonic()
        if not self.seconds or self.reach or done == 0:
            return
        if done == 1:
            self.first_step_end = now
        passed, measured = now - self.began, now - self.first_step_end
        is_measured = done >= MIN_STEPS and measured >= MIN_SECONDS
        if not is_measured and passed < (SOON if done > 2 else LATE) * self.seconds_left:
            return
        # The first step is slower than the others, so it counts only when it is the only one.
        pace = measured / (done - 1) if done > 1 else passed
        steps = trainer.global_step + max(0, int((self.seconds_left - passed) / max(pace, 1e-6)))
        self.reach = replace(self.planned, steps=min(steps, self.planned.planned))
        if trainer.is_global_zero:
            self._log()

    def _log(self) -> None:
        reach, minutes = self.reach, self.seconds / 60
        if reach.steps == reach.planned:
            log.info("%s: all %s steps fit into %.3g minutes", reach.stage, f"{reach.planned:,}", minutes)
            return
        sentence = f"{reach.stage}: about {reach.steps:,} of {reach.planned:,} steps fit into {minutes:.3g} minutes"
        if reach.too_few:
            log.warning("%s: %s", sentence, reach.advice())
        else:
            log.info("%s", sentence)
