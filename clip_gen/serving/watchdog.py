"""Ends Cog's server when its worker process is gone, and the worker when the server is gone.

Cog 0.23.1 starts no other worker: the server stays, and every prediction fails. If the server ends instead, with a
status other than 0, Docker or systemd can start it again. The watchdog is a separate process, because it must outlive
a killed worker. It uses the standard library only and starts in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SERVER = b"cog.server.http"  # in the command line of Cog's server
GRACE = 5.0  # seconds for the server to end by itself after its worker, as after SIGTERM
FAILED = b"setup failed"


@functools.cache
def watch_worker(*folders: Path) -> int | None:
    """Starts the watchdog of this process, a worker of Cog's server. When this process is gone, the server ends with
    status 137, unless it is ending anyway, and the folders are removed. When the server is gone, this process ends,
    which otherwise would finish a training first.

    Returns the descriptor to write FAILED to; None if this process is no worker.
    """
    server = os.getppid()
    if not _is_server(server):
        return None
    ours, theirs = os.pipe()  # the watchdog reads the end of the pipe when this process is gone
    command = [sys.executable, "-I", "-S", __file__, str(server), str(os.getpid()), *map(str, folders)]
    subprocess.Popen(command, stdin=ours, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(ours)
    return theirs


@contextmanager
def server_ends_with_worker(*folders: Path) -> Iterator[None]:
    """Like watch_worker. After an exception in the `with` block the server stays, and Cog answers why setup failed."""
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


def main(server: int, worker: int, folders: Sequence[str]) -> None:
    """The watchdog. Its standard input ends when the worker is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # service managers send them to all processes
        signal.signal(number, signal.SIG_IGN)
    while not select.select([sys.stdin], [], [], 1.0)[0]:
        if not _is_alive(server):
            os.kill(worker, signal.SIGKILL)
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
    """Whether a process ends within so many seconds."""
    end = time.monotonic() + seconds
    while _is_alive(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
