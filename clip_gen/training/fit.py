"""Trains one stage with Lightning.

A stage's folder holds last.ckpt and previous.ckpt (see checkpoints.py), best.ckpt (the weights with the lowest
validation loss), history.jsonl (losses) and ledger.json (each start with its settings).
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from clip_gen.hardware import choose_device, is_out_of_memory, prefers_bfloat16
from clip_gen.training.callbacks import (
    EMA,
    History,
    KeepBest,
    ReseedEachBatch,
    SaveCheckpoints,
    StartLog,
    TimeLimit,
    read_history,
    read_starts,
)
from clip_gen.training.checkpoints import CheckpointFiles, find_checkpoint, read_checkpoint
from clip_gen.training.datasets import Batches
from clip_gen.training.interrupts import Interrupts
from clip_gen.training.loading import loader_with_workers
from clip_gen.training.progress import Progress
from clip_gen.training.stage import FitConfig, Stage, process_count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """Where a stage is trained, in Lightning's terms, and its time limit."""

    devices: str = "auto"
    nodes: int = 1
    strategy: str = "auto"
    max_minutes: float = 0.0  # 0: until the last step
    save_seconds: float = 60.0  # between checkpoints

    def check(self) -> None:
        """ValueError for values that Lightning does not know."""
        if not re.fullmatch(r"auto|0*[1-9]\d*|\d+(,\d+)+", self.devices):
            raise ValueError(
                f"devices is {self.devices}; give how many, 1 or more, or their numbers, as in 0,2, or auto"
            )
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}; give how many machines train together, 1 or more")
        if self.strategy.lower() not in ("auto", *StrategyRegistry.available_strategies()):
            raise ValueError(f'strategy is "{self.strategy}", which Lightning does not have; give auto or ddp')

    def with_gpus_for(self, *batch_sizes: int) -> Machine:
        """With devices "auto", as many of the GPUs as divide each of these batch sizes evenly."""
        available = torch.cuda.device_count() if self.devices == "auto" else 0
        counts = [n for n in range(1, available + 1) if not any(size % (n * self.nodes) for size in batch_sizes)]
        return replace(self, devices=str(counts[-1])) if counts else self


def fit(
    name: str,
    stage: Stage,
    samples: Dataset,
    held_back: Dataset,
    folder: Path,
    *,
    seed: int,
    machine: Machine = Machine(),
    collate: Callable | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, object]:
    """Trains a stage to its last step and leaves its averaged weights in it; returns the values for its record.

    samples: item n is sample number n, without end. If `folder` holds a checkpoint, the stage resumes from it and ends
    with the same weights as without the interruption. ValueError when there is not enough memory for a batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _quiet_lightning()
    config, resumed = stage.config, find_checkpoint(folder)
    steps = resumed.steps if resumed else 0
    interrupts, ema = Interrupts(name), EMA(config.ema_decay)
    best = KeepBest(folder / "best.ckpt", ema, config.patience) if config.patience else None
    own = _callbacks(name, stage, folder, seed, machine, interrupts, ema, best)
    # The given ones come last: their errors must not prevent the last checkpoint.
    with _configuration_explained(machine):
        trainer = _trainer(stage, machine, folder, [*own, *callbacks])
    _check_torchrun(trainer.world_size)
    if steps < config.steps:
        data = StageData(samples, held_back, config, collate, steps)
        with _out_of_memory_explained(name, config.batch_size), _deterministic_on_cpu():
            trainer.fit(stage, datamodule=data, ckpt_path=resumed and resumed.path, weights_only=True)
        steps = trainer.global_step
        if interrupts.number:
            raise SystemExit(128 + interrupts.number)
    else:
        # Lightning would not even load the averaged weights, which are in the checkpoint.
        stage.load_state_dict(read_checkpoint(resumed.path)["state_dict"])
    values = _last_values(trainer, folder) | (best.restore(stage) if best else {})
    stage.to(memory_format=torch.contiguous_format)  # as networks loaded from files are
    if trainer.is_global_zero:
        validated = "  ".join(f"{key} {value}" for key, value in values.items() if key.startswith("val_"))
        log.info("%s: %d steps done  %s", name, steps, validated)
    ended_by = "steps" if steps >= config.steps else "validation" if best and best.out_of_patience else "time"
    return _record(steps, ended_by, values, read_starts(folder / "ledger.json"))


def _callbacks(
    name: str,
    stage: Stage,
    folder: Path,
    seed: int,
    machine: Machine,
    interrupts: Interrupts,
    ema: EMA,
    best: KeepBest | None,
) -> list[Callback]:
    config = stage.config
    return [
        ReseedEachBatch(seed),
        interrupts,
        TimeLimit(name, machine.max_minutes),
        History(folder / "history.jsonl"),
        StartLog(folder / "ledger.json", config),
        ema,
        *([best] if best else []),
        SaveCheckpoints(folder, machine.save_seconds, min(config.validate_every, config.steps), interrupts),
        Progress(name, config.batch_size),
    ]


def _trainer(stage: Stage, machine: Machine, folder: Path, callbacks: list[Callback]) -> pl.Trainer:
    config = stage.config
    return pl.Trainer(
        max_steps=config.steps,
        accelerator="auto",
        devices=int(machine.devices) if machine.devices.isdecimal() else machine.devices,
        num_nodes=machine.nodes,
        strategy=machine.strategy,
        precision=_precision(config.precision),
        gradient_clip_val=1.0,
        callbacks=callbacks,
        plugins=[CheckpointFiles()],
        val_check_interval=min(config.validate_every, config.steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def _check_torchrun(processes: int) -> None:
    """ValueError unless Lightning uses all processes that torchrun started. Each would train alone into one folder."""
    started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else processes
    if started != processes:
        raise ValueError(
            f"torchrun started {started} processes, but devices and nodes make {processes}; "
            "give --devices as many as torchrun starts on each machine"
        )


def _record(steps: int, ended_by: str, values: dict[str, float], starts: list[dict]) -> dict[str, object]:
    return {
        "steps": steps,
        "ended_by": ended_by,
        **values,
        "minutes": round(sum(start["minutes"] for start in starts), 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "starts": starts,
    }


@contextmanager
def _configuration_explained(machine: Machine) -> Iterator[None]:
    """Makes ValueErrors of Lightning's errors about a strategy that cannot be used here."""
    try:
        yield
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        given = f'strategy "{machine.strategy}" with devices {machine.devices}'
        raise ValueError(f"{given} cannot be used on this machine ({error}); give auto or ddp") from error


@contextmanager
def _deterministic_on_cpu() -> Iterator[None]:
    """Without it several threads add the gradients of embeddings in any order. On a GPU it could cost time."""
    if torch.cuda.is_available():
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def _out_of_memory_explained(name: str, batch_size: int) -> Iterator[None]:
    """The person lowers the batch size, not the program: other batches train other weights."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where = f" in one of {process_count()} processes" if process_count() > 1 else ""
        half = f"a smaller batch_size, such as {batch_size // 2}" if batch_size > 1 else "a smaller size or resolution"
        raise ValueError(
            f"{name}: out of memory{where} with batch_size {batch_size} ({error}); train with {half}, "
            "into another folder"
        ) from error


def _last_values(trainer: pl.Trainer, folder: Path) -> dict[str, float]:
    """The last value of everything that was logged, also before this start."""
    logged = {name: value for entry in read_history(folder / "history.jsonl") for name, value in entry.items()}
    logged.pop("step", None)
    return {name: round(float(value), 5) for name, value in (logged | trainer.callback_metrics).items()}


def _quiet_lightning() -> None:
    """Silences Lightning's greetings and the warnings that do not apply here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # torch.compile misses a GPU wherever CUDA is installed.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # StageData starts where the checkpoint ended.
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    # The quantizer's, when only the decoder is trained.
    warnings.filterwarnings("ignore", "Found .* module\\(s\\) in eval mode at the start of training")
    # Validation data is small or already decoded: it needs no worker processes.
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "bf16-mixed" if prefers_bfloat16(choose_device(), training=True) else "32-true"


class StageData(pl.LightningDataModule):
    """The batches of a stage after its first `done` steps; each process loads its share of every batch."""

    def __init__(self, samples: Dataset, held_back: Dataset, config: FitConfig, collate: Callable | None, done: int):
        super().__init__()
        self.samples, self.held_back, self.config = samples, held_back, config
        self.collate, self.done = collate, done

    def train_dataloader(self) -> DataLoader:
        config, trainer = self.config, self.trainer
        batches = Batches(config.steps, config.batch_size, self.done, trainer.global_rank, trainer.world_size)
        return loader_with_workers(self.samples, trainer.num_devices, self.collate, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        # Every process validates on all of it: it takes little time, and the mean is exact.
        return DataLoader(self.held_back, self.config.batch_size, collate_fn=self.collate)
