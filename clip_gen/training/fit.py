"""One stage's training on Lightning: where it runs, what it leaves on disk, and how it resumes.

A stage's folder holds last.ckpt and previous.ckpt (see checkpoints.py), history.jsonl (a line of values every so
often) and ledger.json (when it was started, with what settings, and how far it came).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Timer, WeightAveraging
from pytorch_lightning.strategies import StrategyRegistry
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clip_gen.files import write_text_atomic
from clip_gen.hardware import choose_device, prefers_bfloat16
from clip_gen.training.checkpoints import (
    LAST,
    PREVIOUS,
    DamagedError,
    KeptCheckpoints,
    find_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from clip_gen.training.datasets import Batches, prepared
from clip_gen.training.interrupts import Interrupts
from clip_gen.training.stage import FitConfig, Stage, processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """Where a stage is trained, in Lightning's words, and for how long at most."""

    devices: str = "auto"
    nodes: int = 1
    strategy: str = "auto"
    max_minutes: float = 0.0  # 0: until the last step
    save_seconds: float = 60.0  # between checkpoints

    def check(self) -> None:
        """Raises ValueError for values that Lightning does not know."""
        if not re.fullmatch(r"auto|0*[1-9]\d*|\d+(,\d+)+", self.devices):
            raise ValueError(f"devices is {self.devices}; give how many, 1 or more, which, as 0,2, or auto")
        if self.nodes < 1:
            raise ValueError(f"nodes is {self.nodes}; give how many machines train together, 1 or more")
        if self.strategy.lower() not in ("auto", *StrategyRegistry.available_strategies()):
            raise ValueError(f'strategy is "{self.strategy}", which Lightning does not have; give auto or ddp')

    def sharing(self, *batch_sizes: int) -> Machine:
        """With as many of the GPUs, where that is left to it, as can share each of these batches."""
        there = torch.cuda.device_count() if self.devices == "auto" else 0
        counts = [n for n in range(1, there + 1) if not any(size % (n * self.nodes) for size in batch_sizes)]
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
    """Trains a stage to its last step, leaving its averaged weights in it; returns what to write down about it.

    samples: item n is sample number n, without end. When a checkpoint is in `folder`, the stage resumes from it and
    ends with the very weights it would have had. ValueError when there is not enough memory for a batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _quiet_lightning()
    config, resumed = stage.config, find_checkpoint(folder)
    done = resumed.steps if resumed else 0
    averaging, interrupts = Averaging(config.ema_decay), Interrupts(name)
    best = Best(folder / "best.ckpt", averaging, config.patience) if config.patience else None
    own = [
        Chance(seed),
        interrupts,
        Deadline(name, machine.max_minutes),
        History(folder / "history.jsonl"),
        Ledger(folder / "ledger.json", config),
        averaging,
        *([best] if best else []),
        Checkpoints(folder, machine.save_seconds, min(config.validate_every, config.steps), interrupts),
        Progress(name, config.batch_size),
    ]
    # Errors of the others are not to cost the checkpoint at the end.
    trainer = _trainer(stage, machine, folder, [*own, *callbacks])
    if done < config.steps:
        data = Samples(samples, held_back, config, collate, done)
        with _out_of_memory_explained(name, config.batch_size), _deterministic_on_a_cpu():
            trainer.fit(stage, datamodule=data, ckpt_path=resumed and resumed.path, weights_only=True)
        done = trainer.global_step
        if interrupts.number:
            raise SystemExit(128 + interrupts.number)
    else:
        # Lightning would do nothing, not even put the averaged weights in place; the checkpoint holds them.
        stage.load_state_dict(read_checkpoint(resumed.path)["state_dict"])
    values = _found(trainer, folder) | (best.restore(stage) if best else {})
    stage.to(memory_format=torch.contiguous_format)  # as every network is that comes from a file
    if trainer.is_global_zero:
        validated = "  ".join(f"{key} {value}" for key, value in values.items() if key.startswith("val_"))
        log.info("%s: %d steps done  %s", name, done, validated)
    legs = read_ledger(folder / "ledger.json")
    return {
        "steps": done,
        "ended_by": "steps" if done >= config.steps else "validation" if best and best.beaten else "time",
        **values,
        "minutes": round(sum(leg["minutes"] for leg in legs), 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "legs": legs,
    }


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
        plugins=[KeptCheckpoints()],
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


@contextmanager
def _deterministic_on_a_cpu() -> Iterator[None]:
    """Without it several threads add up the gradients of embeddings in any order. On a GPU it could cost time."""
    if torch.cuda.is_available():
        yield
        return
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # what finds other faults, and takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def _out_of_memory_explained(name: str, batch_size: int) -> Iterator[None]:
    """Lowering the batch size is left to the person: other batches train other weights."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        where = f" in one of {processes()} processes" if processes() > 1 else ""
        half = f"a smaller batch_size, such as {batch_size // 2}" if batch_size > 1 else "a smaller size or resolution"
        raise ValueError(
            f"{name}: out of memory{where} with batch_size {batch_size} ({error}); train with {half}, "
            "into another folder"
        ) from error


def _found(trainer: pl.Trainer, folder: Path) -> dict[str, float]:
    """The last value of everything that was logged, before this process too."""
    logged = {name: value for entry in read_history(folder / "history.jsonl") for name, value in entry.items()}
    logged.pop("step", None)
    return {name: round(float(value), 5) for name, value in (logged | trainer.callback_metrics).items()}


def _quiet_lightning() -> None:
    """Without its greetings and advertisements, and without warnings that do not hold here."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # torch.compile misses a GPU wherever CUDA is installed.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Samples takes up where the checkpoint ended.
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    # The quantiser's, where the decoder alone learns.
    warnings.filterwarnings("ignore", "Found .* module\\(s\\) in eval mode at the start of training")
    # What loads a training's data is a file already decoded, or small: more processes would idle.
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers")


def _precision(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "bf16-mixed" if prefers_bfloat16(choose_device(), training=True) else "32-true"


class Samples(pl.LightningDataModule):
    """The batches of a stage from step `done` on, each process its share of them."""

    def __init__(self, samples: Dataset, held_back: Dataset, config: FitConfig, collate: Callable | None, done: int):
        super().__init__()
        self.samples, self.held_back, self.config = samples, held_back, config
        self.collate, self.done = collate, done

    def train_dataloader(self) -> DataLoader:
        config, trainer = self.config, self.trainer
        batches = Batches(config.steps, config.batch_size, self.done, trainer.global_rank, trainer.world_size)
        return prepared(
            self.samples, trainer.num_devices, batch_sampler=batches, collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        # Every process goes over all of it: little work, and the mean is then exact.
        return DataLoader(self.held_back, self.config.batch_size, collate_fn=self.collate)


class Chance(Callback):
    """Seeds torch's random numbers for every batch from (seed, step), so that a resumed stage draws the same ones."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        # Processes must not all drop out the same neurons.
        torch.manual_seed(((self.seed * 1_000_003 + trainer.global_step) * 4099 + trainer.global_rank) % 2**63)


class Deadline(Timer):
    """Ends the stage after so many minutes of training, 0 for never, and lets the learning rate come down in time.

    The time that passed is in the checkpoint: a resumed stage has only the rest of its minutes.
    """

    def __init__(self, name: str, minutes: float):
        super().__init__()
        self.name, self.minutes = name, minutes

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.global_step and trainer.is_global_zero:
            words = "%s: resumed from step %d of %d, after %.1f minutes"
            log.info(words, self.name, trainer.global_step, trainer.max_steps, self.time_elapsed() / 60)
        self._look(trainer, module)
        self._end_when_over(trainer, module)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self._look(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self._end_when_over(trainer, module)

    def _end_when_over(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if module.time_spent >= 1:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.info("%s: %.1f minutes are over at step %d", self.name, self.minutes, trainer.global_step)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.minutes:
            # The first process's clock counts: what follows from it must be the same in every process.
            module.time_spent = trainer.strategy.broadcast(self.time_elapsed() / (60 * self.minutes))


class History(Callback):
    """A line of JSON with every value that was logged, some 500 in a training; for the report's curves."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.every = max(1, trainer.max_steps // 500)
        # What came after the checkpoint will come again.
        kept = [entry for entry in read_history(self.path) if entry["step"] <= trainer.global_step]
        if trainer.is_global_zero:
            write_text_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % self.every == 0 and trainer.is_global_zero:
            self._write(trainer, "loss")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._write(trainer, "val")

    def _write(self, trainer: pl.Trainer, kind: str) -> None:
        validation = kind == "val"
        values = {
            name: round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val_") == validation
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")


def read_history(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # a line that was cut off has no end


class Progress(Callback):
    """Step of total, pictures a second, time left, learning rate and what was logged.

    In a terminal one line that is written over; elsewhere a line every so many seconds, and one at the end.
    """

    def __init__(self, name: str, batch_size: int, seconds: float = 30.0):
        self.name, self.batch_size, self.seconds = name, batch_size, seconds
        self.bar, self.terminal = None, ExitStack()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = self.said = time.monotonic()
        self.step_said, self.spent = trainer.global_step, module.time_spent
        if sys.stderr.isatty() and trainer.is_global_zero:
            self.terminal.enter_context(logging_redirect_tqdm())
            form = "{desc} {n_fmt}/{total_fmt}{postfix}"
            steps = {"initial": trainer.global_step, "total": trainer.max_steps}
            self.bar = self.terminal.enter_context(tqdm(desc=self.name, bar_format=form, dynamic_ncols=True, **steps))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        now, step = time.monotonic(), trainer.global_step
        passed, due = now - self.said, 1.0 if self.bar else self.seconds
        if not trainer.is_global_zero or (passed < due and step < trainer.max_steps and not trainer.should_stop):
            return
        speed = (step - self.step_said) / passed
        rate = trainer.optimizers[0].param_groups[-1]["lr"]  # AdamW's, where Muon is beside it
        logged = "".join(f"  {name} {float(value):.4f}" for name, value in trainer.callback_metrics.items())
        left = self._left(trainer, module.time_spent, now, speed)
        values = f"{speed * self.batch_size:.0f} pictures/s  {left}  lr {rate:.2g}{logged}"
        if self.bar:
            self.bar.n = step
            self.bar.set_postfix_str(values)
        else:
            log.info("%s %d/%d  %s", self.name, step, trainer.max_steps, values)
        self.said, self.step_said = now, step

    def _left(self, trainer: pl.Trainer, spent: float, now: float, speed: float) -> str:
        """Until the last step or until the time is over, whichever is sooner; then how far that will be."""
        if trainer.should_stop:
            return "0.0 min left"
        left = (trainer.max_steps - trainer.global_step) / speed if speed else float("inf")
        if spent > self.spent:
            until = (now - self.began) * max(0.0, 1 - spent) / (spent - self.spent)
            if until < left:
                return f"{until / 60:.1f} min left, until about step {trainer.global_step + round(speed * until)}"
        return f"{left / 60:.1f} min left"

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.terminal.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.terminal.close()


class Ledger(Callback):
    """ledger.json: one entry for each time the stage was started, with what it was told.

    What a record says of a training that was cut off and taken up again, perhaps with other settings, comes from here.
    """

    def __init__(self, path: Path, config: FitConfig):
        self.path, self.config = path, config

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.began = time.perf_counter()
        self.earlier = [leg for leg in read_ledger(self.path) if leg["from_step"] < trainer.global_step]
        for leg in self.earlier:
            # What came after the checkpoint was lost.
            leg["to_step"] = min(leg["to_step"], trainer.global_step)
        self.from_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % 50 == 0:
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or trainer.global_step == self.from_step:
            return
        minutes = round((time.perf_counter() - self.began) / 60, 2)
        leg = {"from_step": self.from_step, "to_step": trainer.global_step, "minutes": minutes}
        write_text_atomic(self.path, json.dumps([*self.earlier, leg | {"fit": asdict(self.config)}]))


def read_ledger(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.is_file() else []


class Averaging(WeightAveraging):
    """The weights' running mean, at first over the last ninth of all steps so far: with the whole decay from the start,
    the mean of a training of a few dozen steps would still be where it began.
    """

    def __init__(self, decay: float):
        def average(means: list[Tensor], weights: list[Tensor], steps: Tensor) -> None:
            # All at once: one after another they are hundreds of kernels for a GPU to start.
            torch._foreach_lerp_(means, weights, max(9 / (10 + int(steps)), 1 - decay))

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the stage itself is still on the CPU
        super().setup(trainer, pl_module, stage)

    def weights(self) -> dict[str, Tensor]:
        """The averages, by the names of the stage's state_dict."""
        return self._average_model.module.state_dict()


class Best(Callback):
    """Keeps the averaged weights with the least validation loss, and ends the stage when it has not sunk for long."""

    def __init__(self, path: Path, averaging: Averaging, patience: int):
        self.path, self.averaging, self.patience = path, averaging, patience
        self.least, self.since = float("inf"), 0

    @property
    def beaten(self) -> bool:
        """Whether so many validations went by without a better one that the stage ends."""
        return self.since >= self.patience

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.beaten

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        self.since += 1
        if loss < self.least:
            self.least, self.since = loss, 0
            # Lightning has put the trained weights back by now.
            averaged = self.averaging.weights()
            if trainer.is_global_zero:
                save_checkpoint({"state_dict": averaged, "val_loss": loss, "step": trainer.global_step}, self.path)
        if self.beaten:
            log.info("the validation loss has not sunk for %d validations: done", self.since)
            trainer.should_stop = True

    def restore(self, stage: Stage) -> dict[str, float]:
        """Puts the kept weights into the stage, and says of which step they are; the last stay where none are."""
        try:
            kept = read_checkpoint(self.path) if self.path.is_file() else None
        except DamagedError as error:
            log.warning("%s; the last weights are taken instead of the best", error)
            kept = None
        if kept is None:
            return {}
        stage.load_state_dict(kept["state_dict"])
        return {"val_loss": round(kept["val_loss"], 5), "best_step": kept["step"]}

    def state_dict(self) -> dict[str, float]:
        return {"least": self.least, "since": self.since}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.least, self.since = state["least"], state["since"]


class Checkpoints(Callback):
    """last.ckpt every so many seconds, and at the end; where it takes long to write, less often, but no less than every
    ten times as many; and at once when a signal is to end the training.

    At a step with a validation it waits for what that finds: a run resumed from there would not validate again.
    """

    def __init__(self, folder: Path, seconds: float, validate_every: int, interrupts: Interrupts):
        self.folder, self.seconds, self.validate_every = folder, seconds, validate_every
        self.interrupts = interrupts

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved, self.took = time.monotonic(), 0.0
        path = trainer.ckpt_path
        if trainer.is_global_zero and path and Path(path).name == PREVIOUS:
            # By now every process has read it, and the next one to be written must not replace it.
            os.replace(path, self.folder / LAST)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % self.validate_every:
            self._save_when_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save_when_due(trainer)

    def _save_when_due(self, trainer: pl.Trainer) -> None:
        due = time.monotonic() - self.saved >= max(self.seconds, min(19 * self.took, 10 * self.seconds))
        if trainer.strategy.reduce_boolean_decision(due or bool(self.interrupts.number), all=False):
            self._save(trainer)
            self.interrupts.end(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved = time.monotonic()
        self.took = self.saved - began
