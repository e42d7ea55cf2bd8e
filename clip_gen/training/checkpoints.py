"""A stage's checkpoints: last.ckpt and previous.ckpt, written completely and verified before a training resumes."""

from __future__ import annotations

import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.plugins.io import TorchCheckpointIO

from clip_gen.files import atomic_file

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    steps: int


class DamagedError(ValueError):
    """A checkpoint file that was truncated or changed after it was written."""


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint of the stage in `folder`; None without checkpoints. ValueError if all are damaged.

    If last.ckpt is damaged and previous.ckpt is not, the first process removes last.ckpt. The others find the same.
    """
    damaged = []
    for path in _checkpoints(folder):
        try:
            checkpoint = Checkpoint(path, int(read_checkpoint(path)["global_step"]))
        except DamagedError as error:
            damaged.append(str(error))
            continue
        if damaged and not rank_zero_only.rank:
            message = "%s: resuming from the checkpoint before it, of step %d; later steps are trained again"
            log.warning(message, damaged[0], checkpoint.steps)
            (folder / LAST).unlink()  # the next checkpoint must not replace the intact one by it
        return checkpoint
    if damaged:
        raise ValueError(
            f"{' and '.join(damaged)}, and there is no other checkpoint: "
            f"delete {folder} to train this stage from its start, or restore the files from a backup"
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    return bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]


def read_checkpoint(path: Path) -> dict[str, object]:
    """The values of a checkpoint, on the CPU. DamagedError if a checksum is wrong or the file cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format; its entries have checksums
            if bad := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {bad}")
        return torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can raise anything
        raise DamagedError(f"{path} is damaged ({error})") from error


class CheckpointFiles(TorchCheckpointIO):
    """Renames last.ckpt to previous.ckpt before it writes a new last.ckpt, so the disk never holds three."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        path = Path(path)
        if path.is_file():
            os.replace(path, path.with_name(PREVIOUS))
        save_checkpoint(checkpoint, path)


def save_checkpoint(values: dict, path: Path) -> None:
    """Writes the file completely or not at all. OSError if the disk is full."""
    try:
        # torch.save refuses names that start with a dot, so it gets an open file.
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(values, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises the second while it handles the first
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
