"""How `max_minutes` is divided between the stages of a training, over all its starts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from clip_gen.files import write_text_atomic

OUTSIDE = "minutes"  # of all starts outside the stages
VQGAN_TIME = 0.2  # of max_minutes; the transformer gets the rest
MIN_MINUTES = 0.1  # for the transformer, however long the steps before it took


class Minutes:
    """The clock of a training. max_minutes: of all starts together; 0: no limit. work: where it is saved."""

    def __init__(self, work: Path, max_minutes: float):
        self.saved, self.max_minutes, self.began = work / OUTSIDE, max_minutes, time.monotonic()
        self.expected = 0.0  # minutes of the last stage and the encoding before it; 0: not known

    def outside(self) -> float:
        """Minutes of all starts outside the stages, such as on encoding."""
        saved = float(self.saved.read_text()) if self.saved.is_file() else 0.0
        return saved + (time.monotonic() - self.began) / 60

    def save(self) -> None:
        """Before a stage: what has passed until now counts also if the stage is interrupted."""
        write_text_atomic(self.saved, f"{self.outside():.4f}")
        self.began = time.monotonic()

    def leave_out(self) -> None:
        """After a stage, whose minutes are in its record."""
        self.began = time.monotonic()

    def for_stage(self, is_last: bool, earlier: Iterable[float]) -> float:
        """The time limit of a stage, 0 for none. earlier: the minutes of the stages before it."""
        if not self.max_minutes or not is_last:
            return VQGAN_TIME * self.max_minutes
        return max(MIN_MINUTES, self.max_minutes - self.outside() - sum(earlier))

    def after(self, minutes: float, is_last: bool) -> float:
        """What is left of max_minutes for the stages after one of so many minutes, or without a limit what is expected
        of them; 0 if there are none.
        """
        left = max(0.0, self.max_minutes - self.outside() - minutes) if self.max_minutes else self.expected
        return 0.0 if is_last else left
