"""How the processes of a training wait for files in its folder, which the first process writes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from clip_gen.files import PARTIAL

PARENT = os.getppid()  # 1 where that is a container's first process


def announce(path: Path) -> IO[str]:
    """Tells the other processes that this one has prepared the folder, for as long as the returned file is open.

    They look for its lock, which ends with this process in any case, so a file of an earlier start means nothing.
    """
    temporary = path.with_name(f"{PARTIAL}{path.name}")
    file = temporary.open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.replace(temporary, path)
    return file


def wait_for_announcement(path: Path) -> None:
    """Waits until the first process of this training has called `announce`; OSError like wait_for."""
    _wait(path, lambda: _is_locked(path))


def wait_for(path: Path) -> None:
    """Waits until the file exists, which the first process of a training writes for all.

    OSError if the parent process has ended, which is the first process itself or torchrun.
    """
    _wait(path, path.is_file)


def _wait(path: Path, done: Callable[[], bool]) -> None:
    while not done():
        if os.getppid() != PARENT:
            raise OSError(
                f"{path} is missing, and the process that was to write it has ended; see what it printed above"
            )
        time.sleep(0.2)


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False
