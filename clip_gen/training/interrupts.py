"""How a training is interrupted: Ctrl-C, SIGTERM, a closed terminal, or the end of the process that started it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Sets the handler of all SIGNALS that are not ignored (nohup ignores some); returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        return {}
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextmanager
def ended_by_signals(seconds: float) -> Iterator[None]:
    """A signal raises SystemExit with the status that shells expect, 128 plus its number.

    The process ends after `seconds` in any case: the exception can leave interrupted code, such as a compiler, waiting
    for a lock.
    """

    def end(number: int, frame: FrameType | None) -> None:
        _ignore_further_signals()
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


def _ignore_further_signals() -> None:
    """From now on Ctrl-C ends the process at once and the other signals do nothing."""
    time.sleep(0.2)  # `timeout` sends its signal twice
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


class Interrupts(Callback):
    """After the first step a signal does not end the stage at once: SaveCheckpoints saves and calls `end`."""

    def __init__(self, name: str):
        self.name, self.number, self.stepped = name, 0, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}  # Lightning sets its own after this

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.alone, self.first = trainer.world_size == 1, trainer.is_global_zero
        # Replaces Lightning's, which broadcasts inside the handler. Lightning restores the ones before at the end.
        handle_signals(self._received)

    def on_train_batch_end(self, *_: object) -> None:
        self.stepped = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self.stepped and self.alone:  # nothing to save yet
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
            return
        if not self.number:
            _ignore_further_signals()
        self.number = number
        if self.first:
            message = f"\n{self.name}: {signal.Signals(number).name}: saving a checkpoint; Ctrl-C ends at once\n"
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(2, message.encode())  # a handler must not use sys.stderr, which it may have interrupted

    def end(self, trainer: pl.Trainer) -> None:
        """Raises SystemExit in all processes if any of them received a signal; every process must call it."""
        received = torch.tensor(float(self.number), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number:
            if trainer.is_global_zero:
                message = "%s: ended by %s; the checkpoint of step %d is saved"
                log.info(message, self.name, signal.Signals(number).name, trainer.global_step)
            raise SystemExit(128 + number)


def watch_stdin() -> None:
    """Ends the training when standard input closes, because the process at its other end is gone. Returns at once."""
    threading.Thread(target=_end_with_stdin, name="watch-stdin", daemon=True).start()


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
