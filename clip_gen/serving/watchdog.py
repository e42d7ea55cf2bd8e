"""Ends Cog's server when its worker process is gone.

Cog 0.23.1 starts no other worker: the server stays, and every prediction fails. Once the server ends with a status
that is not 0, whatever runs it can start it again. The watchdog is a process of its own, so that it outlives a worker
that was killed; it uses the standard library alone and starts in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SERVER = b"cog.server.http"  # in the command line of Cog's server
GRACE = 5.0  # seconds that a server has to end by itself once its worker is gone, as after SIGTERM
FAILED = b"setup failed"


@functools.cache
def watch_worker(*folders: Path) -> int | None:
    """To be called in a worker of Cog's: from here on the server ends soon after it, with status 137 unless it was
    ending anyway, and the folders are removed. Gives where to write FAILED; None where Cog's server runs no worker.
    """
    server = os.getppid()
    if not _is_server(server):
        return None
    ours, theirs = os.pipe()  # the watchdog reads its end of it when this process is gone, however it went
    command = [sys.executable, "-I", "-S", __file__, str(server), *map(str, folders)]
    subprocess.Popen(command, stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(ours)
    return theirs


@contextmanager
def server_ends_with_worker(*folders: Path) -> Iterator[None]:
    """As watch_worker. When what is inside the `with` raises, the server stays, and Cog answers why setup failed."""
    pipe = watch_worker(*folders)
    try:
        yield
    except BaseException:
        if pipe is not None:
            os.write(pipe, FAILED)
        raise


def _is_server(process: int) -> bool:
    try:
        return SERVER in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def main(server: int, folders: Sequence[str]) -> None:
    """The watchdog: waits until standard input ends, which is when the worker is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a service manager sends them to all processes
        signal.signal(number, signal.SIG_IGN)
    setup_failed = FAILED in sys.stdin.buffer.read()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    if setup_failed or _ends(server, GRACE):
        return
    with contextlib.suppress(OSError), open(f"/proc/{server}/fd/2", "a") as log:
        log.write("the worker process was killed or has crashed; ending the server, so that it can be started again\n")
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGKILL)
        if not _ends(server, 1.0):
            os.kill(server, signal.SIGTERM)  # the first process of a container gets no SIGKILL from inside


def _ends(process: int, seconds: float) -> bool:
    """Whether that process is gone within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
