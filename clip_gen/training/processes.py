"""How the processes of a training that share a folder wait for one another: the first writes, the others read."""

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
    """Tells the others that what the first process prepares at its start is done, as long as the returned file is open.

    The kernel closes it when this process ends, however it does, so that a file from an earlier start tells nothing.
    """
    unseen = path.with_name(f"{PARTIAL}{path.name}")
    file = unseen.open("w")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.replace(unseen, path)
    return file


def wait_for_announcement(path: Path) -> None:
    """Returns once the first process of this training has announced itself by that file; OSError as wait_for."""
    _wait(path, lambda: _is_locked(path))


def wait_for(path: Path) -> None:
    """Returns once the file exists, which the first process of a training writes for all of them.

    OSError when the process that started this one has ended: the first process itself, or torchrun.
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
