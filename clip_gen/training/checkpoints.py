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


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint of the stage in `folder`; None without checkpoints.

    ValueError if all are damaged. Changes no files, so every process of a training finds the same one.
    """
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            steps = int(read_checkpoint(path)["global_step"])
        except DamagedError as error:
            damaged.append(str(error))
            continue
        if damaged and not rank_zero_only.rank:
            log.warning(
                "%s: resuming from the checkpoint before it, of step %d; later steps are trained again",
                damaged[0],
                steps,
            )
        return Checkpoint(path, steps)
    if damaged:
        raise ValueError(
            f"{' and '.join(damaged)}, and there is no other checkpoint: "
            f"delete {folder} to train this stage from its start, or restore the files from a backup"
        )
    return None


def has_checkpoint(folder: Path) -> bool:
    return (folder / LAST).is_file() or (folder / PREVIOUS).is_file()


class DamagedError(ValueError):
    """A checkpoint file that was truncated or changed after it was written."""


def read_checkpoint(path: Path) -> dict[str, object]:
    """The values of a checkpoint, on the CPU. DamagedError if a checksum is wrong or the file cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format; its entries have checksums
            bad = archive.testzip()
        if bad is None:
            return torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can raise anything
        raise DamagedError(f"{path} is damaged ({error})") from error
    raise DamagedError(f"{path} is damaged (wrong checksum of {bad})")


class CheckpointFiles(TorchCheckpointIO):
    """Replaces a checkpoint once the new one is completely on disk, and keeps the one before as previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        path = Path(path)
        previous = path.with_name(PREVIOUS)
        if path.is_file():
            previous.unlink(missing_ok=True)  # first, so the disk never holds three
        save_checkpoint(checkpoint, path, previous)


def save_checkpoint(values: dict, path: Path, previous: Path | None = None) -> None:
    """Writes `path`; an existing file there becomes `previous`. OSError with a remedy when the disk is full."""
    try:
        with atomic_file(path) as temporary:
            # torch.save refuses names that start with a dot.
            with open(temporary, "wb") as file:
                torch.save(values, file)
            if previous and path.is_file():
                os.replace(path, previous)
    except (OSError, RuntimeError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        complete = path.is_file() or (previous and previous.is_file())
        kept = "the one before it is complete" if complete else "there was none before it"
        raise OSError(
            f"{path}: the checkpoint could not be written ({reason.strerror or reason}); {kept}. "
            "Make room, or make the folder writable, and start the same command again"
        ) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """The disk's error behind torch's: its writer fails a second time while it closes the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
