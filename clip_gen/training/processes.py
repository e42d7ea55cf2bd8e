"""How the processes of a training share its folder: they wait for files of the first one, and divide work."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch

PARENT = os.getppid()  # 1 where that is a container's first process


def announce(path: Path) -> IO[str]:
    """Tells the other processes that this one has prepared the folder, for as long as the returned file is open.

    They look for its lock, which ends with this process in any case, so a file of an earlier start means nothing.
    """
    path.unlink(missing_ok=True)
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def wait_for_announcement(path: Path) -> None:
    """Waits until the first process of this training has called `announce`; OSError like wait_for."""
    wait_for(path, _is_locked)


def wait_for(path: Path, is_ready: Callable[[Path], bool] = Path.is_file) -> None:
    """Waits until the file exists, which the first process of a training writes for all.

    OSError if the parent process has ended, which is the first process itself or torchrun.
    """
    while not is_ready(path):
        if os.getppid() != PARENT:
            raise OSError(f"{path} is missing, and the process that writes it has ended; see what it printed above")
        time.sleep(0.2)


def count() -> int:
    """How many processes torchrun or Lightning has started for this training, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def use_own_gpu() -> None:
    """Makes this process's GPU the current one, before Lightning does."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def divided(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths that do not exist yet, each given to one of the processes that call this, which then makes it.

    A process has a path until it asks for the next one. If it ends before it has made the path, another process gets
    it. Ends when all paths exist.
    """
    while missing := [path for path in paths if not path.exists()]:
        for path in missing:
            with _lock(path, wait=False) as is_mine:
                if is_mine and not path.exists():
                    yield path
        time.sleep(0.1)


def wait_until_free(paths: Sequence[Path]) -> None:
    """Waits until no process makes one of these paths any more."""
    for path in paths:
        if not path.exists():
            with _lock(path, wait=True):
                pass


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock of a path to be made. The lock ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            if path.exists():
                lock.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)  # workers that were forked meanwhile have the file open too


def _is_locked(path: Path) -> bool:
    try:
        with suppress(FileNotFoundError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
