"""`python -m clip_gen train`: every setting as an option, and where to train."""

from __future__ import annotations

import argparse
import errno
import gc
import logging
import os
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from clip_gen.files import COMMAND
from clip_gen.training.checkpoints import has_checkpoint
from clip_gen.training.expectation import dry_run
from clip_gen.training.fit import Machine
from clip_gen.training.interrupts import ended_by_signals, watch_stdin
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings
from clip_gen.training.stage import process_count

log = logging.getLogger(__name__)

SECONDS_TO_END = 20.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

MACHINE = {
    "devices": "Number of GPUs, or of processes without a GPU.",
    "nodes": "Number of machines that train together.",
    "strategy": "One of Lightning's strategies, by name. Tested: auto and ddp, on CPUs.",
    "shard_gb": "Gigabytes of small copies of shards' pictures that are kept on the disk, for stage 1.",
    "save_seconds": "Seconds between checkpoints.",
    "loggers": "Where curves and samples go beside the report: csv, tensorboard, wandb, some of them between commas, "
    "auto (CSV, and TensorBoard if it is installed) or none.",
    "evaluate_every": "Steps between FID and CMMD on held-back pictures, which take time to draw. 0: none.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "zips, tars, folders, pictures, text files that list such, or shards such as 'URL/{0000..0099}.tar'"
    parser.add_argument("images", nargs="+", help=what)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights; the same command resumes")
    machine = [spec for spec in fields(Machine) if spec.name in MACHINE]
    for spec in (*fields(TrainSettings), *machine):
        kind, choices = type(spec.default), spec.metadata.get("choices")
        words = spec.metadata.get("description") or MACHINE[spec.name]
        words += "" if spec.default == "" else " Default: %(default)s."
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:  # TrainSettings.check() names a value that is no choice, and the remedy
            how = {"type": kind, "metavar": "|".join(choices or [kind.__name__])}
        parser.add_argument(f"--{spec.name.replace('_', '-')}", default=spec.default, help=words, **how)
    parser.add_argument("--dry-run", action="store_true", help="say what to expect, and stop there")
    parser.add_argument("--watch-stdin", action="store_true", help="end at once when standard input closes")


def main(arguments: argparse.Namespace) -> None:
    if arguments.watch_stdin:
        watch_stdin()
    gc.freeze()  # collections skip what is imported
    settings = TrainSettings(**{spec.name: getattr(arguments, spec.name) for spec in fields(TrainSettings)})
    machine = Machine(**{name: getattr(arguments, name) for name in MACHINE})
    try:
        with ended_by_signals(SECONDS_TO_END):
            training = Training(arguments.images, arguments.out, settings, machine)
            if arguments.dry_run:
                return dry_run(training)
            weights = training.run()
    except SystemExit:  # by a signal
        if not rank_zero_only.rank:
            log.warning(how_to_resume(arguments.out))
        raise
    except RuntimeError as error:
        reason = process_that_ended(error)
        if reason is None:
            raise
        raise ValueError(f"{reason}. {how_to_resume(arguments.out)}") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(f"{arguments.out}: {error.strerror}. Make room. {how_to_resume(arguments.out)}") from error
    if not rank_zero_only.rank:
        print(weights)


def process_that_ended(error: RuntimeError) -> str | None:
    """A sentence when another process of the training was killed; None for other errors."""
    if str(error).startswith("DataLoader worker") and "killed" in str(error):
        return "A process that loads pictures was killed, perhaps for lack of memory: try a smaller batch_size"
    if process_count() > 1 and re.search("gloo|NCCL|[Cc]onnection", str(error)):
        return "Another process of this training has ended: see what it printed above"
    return None


def how_to_resume(out: Path) -> str:
    command = os.environ.get(COMMAND) or shlex.join(sys.orig_argv)
    this = "under torchrun as before, this command" if "TORCHELASTIC_RUN_ID" in os.environ else "this command"
    if any(has_checkpoint(folder) for folder in (out / "work").glob("*")):
        return f"{out} holds a checkpoint; {this} resumes the training: {command}"
    return f"{out} holds no checkpoint yet; {this} starts the training: {command}"
