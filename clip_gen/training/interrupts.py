"""How a training is interrupted: Ctrl-C, SIGTERM, a closed terminal, or the end of the process that started it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Sets the handler of all SIGNALS that are not ignored (nohup ignores some); returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        return {}
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def ignore_further_signals() -> None:
    """From now on Ctrl-C ends the process at once and the other signals do nothing."""
    time.sleep(0.2)  # `timeout` sends its signal twice
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


@contextmanager
def ended_by_signals(seconds: float) -> Iterator[None]:
    """A signal raises SystemExit with the status that shells expect, 128 plus its number.

    The process ends after `seconds` in any case: the exception can leave interrupted code, such as a compiler, waiting
    for a lock.
    """

    def end(number: int, frame: FrameType | None) -> None:
        ignore_further_signals()
        timer = threading.Timer(seconds, os._exit, [128 + number])
        timer.daemon = True
        timer.start()
        raise SystemExit(128 + number)

    before = handle_signals(end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_stdin() -> None:
    """Ends the training when standard input closes, because the process at its other end is gone. Returns at once."""

    def end_with_stdin() -> None:
        while os.read(0, 4096):
            pass
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_stdin, name="watch-stdin", daemon=True).start()
