"""Ends a training when the process that started it is gone: nobody would see what it says, or end it."""

from __future__ import annotations

import os
import signal
import threading
import time

SAVE, END = WAYS = ("save", "end")
MOST_SECONDS = 600  # to save a checkpoint


def watch_stdin(way: str) -> None:
    """Returns at once. Standard input closes when the process that holds its other end is gone, however it went.

    way: "save" ends as by SIGTERM, which saves a checkpoint first; "end" at once.
    """
    threading.Thread(target=_watch, args=(way,), name="watch-stdin", daemon=True).start()


def _watch(way: str) -> None:
    while os.read(0, 4096):
        pass
    if way == SAVE:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(MOST_SECONDS)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
