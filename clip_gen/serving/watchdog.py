"""Ends Cog's server when its worker process is gone, and the worker when the server is gone.

Cog 0.23.1 starts no other worker: the server stays, and every prediction fails. If the server ends instead, with a
status other than 0, Docker or systemd can start it again. The watchdog is a separate process, because it must outlive
a killed worker. It uses the standard library only and starts in a few milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = b"cog.server.http"  # in the command line of Cog's server
GRACE = 5.0  # seconds for the server to end by itself after its worker, as after SIGTERM

_watchdogs: list[subprocess.Popen] = []  # of this process


@functools.cache
def worker_folder(prefix: str) -> Path:
    """A new temporary folder of this process. If this is a worker of Cog's server, also starts the watchdog.

    When the worker is gone, the watchdog removes the folder and ends the server with status 137, unless that is ending
    anyway. When the server is gone, it ends the worker, which otherwise would finish a training first.
    """
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server = os.getppid()
    command_line = Path(f"/proc/{server}/cmdline")
    if command_line.exists() and SERVER in command_line.read_bytes():
        ours, _theirs = os.pipe()  # the watchdog reads the end of the pipe when this process is gone
        command = [sys.executable, "-I", "-S", __file__, str(server), str(os.getpid()), folder]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        _watchdogs.append(subprocess.Popen(command, stdin=ours, start_new_session=True, **silent))
        os.close(ours)
    return Path(folder)


def stop_watchdog() -> None:
    """The server stays when this worker ends."""
    for watchdog in _watchdogs:
        watchdog.kill()


def main(server: int, worker: int, folder: str) -> None:
    """The watchdog. Its standard input ends when the worker is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # service managers send them to all processes
        signal.signal(number, signal.SIG_IGN)
    server_end = os.pidfd_open(server)  # readable when the server has ended
    if server_end in select.select([sys.stdin, server_end], [], [])[0]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    if select.select([server_end], [], [], GRACE)[0]:
        return
    with contextlib.suppress(OSError), open(f"/proc/{server}/fd/2", "a") as log:
        log.write("the worker process was killed or has crashed; ending the server, so that it can be started again\n")
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(server_end, signal.SIGKILL)
        if not select.select([server_end], [], [], 1.0)[0]:
            # The first process of a container gets no SIGKILL from inside.
            signal.pidfd_send_signal(server_end, signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
