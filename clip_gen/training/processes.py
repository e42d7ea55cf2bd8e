"""How the processes of a training wait for files in its folder, which the first process writes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

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


def _is_locked(path: Path) -> bool:
    try:
        with suppress(FileNotFoundError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
