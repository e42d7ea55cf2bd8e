"""How long a training has taken over all its starts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback

from clip_gen.files import write_text_atomic
from clip_gen.training.fit import read_ledger


class Clock(Callback):
    """Minutes of a training, in a file that is written with every checkpoint: what comes after one and is lost does
    not count, as it does not in the checkpoint.

    `work` is the folder with the folders of the stages; `began` is when this start was, by time.monotonic.
    """

    def __init__(self, work: Path, stages: Sequence[str], began: float):
        self.path, self.began = work / "clock.json", began
        if self.path.is_file():
            saved = json.loads(self.path.read_text())
            self.before, self.outside = saved["minutes"], saved["outside"]
        else:  # an earlier version wrote none
            legs = [leg for stage in stages for leg in read_ledger(work / stage / "ledger.json")]
            self.before, self.outside = sum(leg["minutes"] for leg in legs), {}

    @property
    def here(self) -> float:
        """Minutes since this start."""
        return (time.monotonic() - self.began) / 60

    @property
    def minutes(self) -> float:
        """Minutes in all."""
        return self.before + self.here

    def spent_outside(self, stage: str) -> float:
        """Minutes in all, just before a stage starts or resumes, without those that the stage itself has trained."""
        self.outside[stage] = self.outside[stage] + self.here if stage in self.outside else self.minutes
        self.save()
        return self.outside[stage]

    def save(self) -> None:
        if not rank_zero_only.rank:
            write_text_atomic(self.path, json.dumps({"minutes": round(self.minutes, 4), "outside": self.outside}))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self.save()
