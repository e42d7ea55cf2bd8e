"""Trains one stage with Lightning.

A stage's folder holds last.ckpt and previous.ckpt (see checkpoints.py), best.ckpt (the weights with the lowest
validation loss) and history.jsonl (losses).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from clip_gen.hardware import choose_device, is_out_of_memory, prefers_bfloat16
from clip_gen.training.callbacks import (
    EMA,
    History,
    KeepBest,
    ReseedEachBatch,
    SaveCheckpoints,
    TimeLimit,
    history_interval,
)
from clip_gen.training.checkpoints import CheckpointFiles, find_checkpoint
from clip_gen.training.datasets import Batches, loader_with_workers
from clip_gen.training.loggers import closing_runs
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
    minutes_after: float = 0.0  # that the stages after this one take; 0: there are none, or it is not known
    save_seconds: float = 60.0  # between checkpoints
    shard_gb: float = 1.5  # of shards' pictures that are kept on the disk
    evaluate_every: int = 0  # steps between evaluations on the held-back pictures; 0: none
    loggers: str = "auto"  # see logger_names()

    def trainer(self, loggers: Sequence[Logger] = (), **options: object) -> pl.Trainer:
        """Lightning's trainer for this machine; ValueError for devices, nodes or a strategy that it refuses."""
        _quiet_lightning()
        try:
            return pl.Trainer(
                accelerator="auto",
                devices=int(self.devices) if self.devices.isdecimal() else self.devices,
                num_nodes=self.nodes,
                strategy=self.strategy,
                logger=list(loggers) or False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **options,
            )
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            raise ValueError(
                f'this machine cannot train with devices {self.devices}, nodes {self.nodes} and strategy "'
                f'{self.strategy}" ({error}); give devices auto or their number, and strategy auto or ddp'
            ) from error

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
    loggers: Sequence[Logger] = (),
) -> dict[str, object]:
    """Trains a stage to its last step and leaves its averaged weights in it; returns the values for its record.

    samples: item n is sample number n, without end. If `folder` holds a checkpoint, the stage resumes from it and ends
    with the same weights as without the interruption. ValueError when there is not enough memory for a batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, resumed = stage.config, find_checkpoint(folder)
    limit, history, ema = TimeLimit(name, machine.max_minutes), History(folder / "history.jsonl"), EMA(config.ema_decay)
    best = KeepBest(folder / "best.ckpt", ema, config.patience) if config.patience else None
    saving = SaveCheckpoints(name, folder, machine.save_seconds, min(config.validate_every, config.steps))
    own = [ReseedEachBatch(seed), limit, history, ema, *([best] if best else []), saving]
    # The given callbacks come last: their errors must not prevent the last checkpoint.
    progress = Progress(name, config.batch_size, limit, machine.minutes_after)
    trainer = _trainer(config, machine, folder, [*own, progress, *callbacks], loggers)
    done = resumed.steps if resumed else 0
    batches = Batches(config.steps, config.batch_size, done, trainer.global_rank, trainer.world_size)
    loader = loader_with_workers(samples, trainer.num_devices, collate, batch_sampler=batches)
    # Every process validates on all of it: it takes little time, and the mean is exact.
    validation = DataLoader(held_back, config.batch_size, collate_fn=collate)
    with _out_of_memory_explained(name, config.batch_size), _deterministic_on_cpu(), closing_runs(loggers):
        trainer.fit(stage, loader, validation, ckpt_path=resumed and resumed.path, weights_only=True)
    if saving.signal:
        raise SystemExit(128 + saving.signal)
    stage.load_state_dict(ema.weights())  # Lightning does not if the checkpoint was of the last step
    values = history.last_values(trainer) | (best.restore(stage) if best else {})
    stage.to(memory_format=torch.contiguous_format)  # as networks loaded from files are
    if trainer.is_global_zero:
        validated = "  ".join(f"{key} {value}" for key, value in values.items() if key.startswith("val_"))
        log.info("%s: %d steps done  %s", name, trainer.global_step, validated)
    return _record(trainer, config, values, limit, best)


def _record(
    trainer: pl.Trainer, config: FitConfig, values: dict[str, object], limit: TimeLimit, best: KeepBest | None
) -> dict[str, object]:
    steps, starts = trainer.global_step, limit.starts(trainer.global_step)
    ended_by = "steps" if steps >= config.steps else "validation" if best and best.out_of_patience else "time"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    minutes = round(sum(start["minutes"] for start in starts), 2)
    where = {"device": device, "precision": trainer.precision}
    return {"steps": steps, "ended_by": ended_by, **values, "minutes": minutes, **where, "starts": starts}


def _trainer(
    config: FitConfig, machine: Machine, folder: Path, callbacks: list[Callback], loggers: Sequence[Logger]
) -> pl.Trainer:
    """ValueError unless it uses all processes that torchrun started. Each would train alone into one folder."""
    trainer = machine.trainer(
        loggers,
        log_every_n_steps=history_interval(config.steps),
        max_steps=config.steps,
        precision=lightning_precision(config),
        gradient_clip_val=1.0,
        callbacks=callbacks,
        plugins=[CheckpointFiles()],
        val_check_interval=min(config.validate_every, config.steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else trainer.world_size
    if started != trainer.world_size:
        raise ValueError(
            f"torchrun started {started} processes, but devices and nodes make {trainer.world_size}; "
            "give --devices as many as torchrun starts on each machine"
        )
    return trainer


def lightning_precision(config: FitConfig) -> str:
    """The number format in Lightning's terms, with auto resolved for this machine."""
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if prefers_bfloat16(choose_device(), training=True) else "32-true"


@contextmanager
def _deterministic_on_cpu() -> Iterator[None]:
    """Without it several threads add the gradients of embeddings in any order. On a GPU it could cost time."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


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


def _quiet_lightning() -> None:
    """Silences Lightning's greetings and the warnings that do not apply here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # torch.compile misses a GPU wherever CUDA is installed.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for message in (
        "You're resuming from a checkpoint that ended before the epoch ended",  # the batches start after it
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Found .* module\\(s\\) in eval mode at the start of training",  # the quantizer, if only the decoder is trained
        "You defined a `validation_step` but have no `val_dataloader`",  # when steps are timed
        "The '.*dataloader' does not have many workers",  # validation needs none: its data is small or decoded already
    ):
        warnings.filterwarnings("ignore", message)
