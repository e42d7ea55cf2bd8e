"""How much of a training its time suffices for: said after the first steps of a stage, and again at its end."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

log = logging.getLogger(__name__)

# Shares of the planned steps. Below the first a new model draws blobs; the README's model, which draws three of four
# prompts right, had the second.
TOO_FEW, ENOUGH = 0.1, 0.25
STEPS, SECONDS = 5, 2.0  # to measure
# Of the stage's time, after which fewer steps have to do: two or more beside the first, or any.
SOON, LATE = 0.1, 0.3
TOO_FEW_FOR = {"vqgan": "too few for more than blobs", "gpt": "too few for pictures that suit their prompts"}


@dataclass(frozen=True)
class Reach:
    """So many of a stage's `planned` steps, in a training of max_minutes.

    fine_tunes: the stage starts from a base that knows its part, which few steps change little. remedy: what else than
    more minutes helps, as the end of a sentence.
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
        """What so few steps mean, and what to do."""
        means = "too few to change much of the base model" if self.fine_tunes else TOO_FEW_FOR[self.stage]
        minutes = enough_minutes(self.max_minutes, self.steps, ENOUGH * self.planned)
        return f"{means}; give max_minutes of about {minutes}{self.remedy}"


def enough_minutes(max_minutes: float, reached: float, wanted: float) -> str:
    """The max_minutes in which `wanted` is done when `reached` is done in those given, to two digits."""
    return f"{float(f'{max_minutes * wanted / max(reached, 1):.2g}'):,g}"


class Forecast(Callback):
    """Says after the first steps how many the stage's minutes suffice for; nothing where there is no end.

    `reach` is None until then.
    """

    def __init__(self, minutes: float, planned: Reach):
        self.seconds, self.planned, self.reach = 60 * minutes, planned, None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first, self.began = trainer.global_step, time.monotonic()
        self.left = self.seconds * (1 - module.time_spent)
        self.warm = self.began  # the end of the first step, which takes longer than others

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        done, now = trainer.global_step - self.first, time.monotonic()
        if not self.seconds or self.reach or done == 0:
            return
        if done == 1:
            self.warm = now
        passed = now - self.began
        measured = done >= STEPS and now - self.warm >= SECONDS
        if not measured and passed < (SOON if done > 2 else LATE) * self.left:
            return
        pace = (now - self.warm) / (done - 1) if done > 1 else passed
        steps = trainer.global_step + max(0, int((self.left - passed) / max(pace, 1e-6)))
        self.reach = replace(self.planned, steps=min(steps, self.planned.planned))
        if trainer.is_global_zero:
            self._say()

    def _say(self) -> None:
        reach, minutes = self.reach, self.seconds / 60
        if reach.steps == reach.planned:
            log.info("%s: all %s steps fit into %.3g minutes", reach.stage, f"{reach.planned:,}", minutes)
            return
        sentence = f"{reach.stage}: about {reach.steps:,} of {reach.planned:,} steps fit into {minutes:.3g} minutes"
        if reach.too_few:
            log.warning("%s: %s", sentence, reach.advice())
        else:
            log.info("%s", sentence)
