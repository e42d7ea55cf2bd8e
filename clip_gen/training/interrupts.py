"""Ctrl-C, SIGTERM and a closed terminal: a stage saves a checkpoint before the training ends."""

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
    """Sets the handler for all SIGNALS that are not ignored, as nohup has it; returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        return {}
    wanted = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextmanager
def ended_by_signals(seconds: float) -> Iterator[None]:
    """A signal raises SystemExit, with the exit status that shells know: 128 and its number. The process ends in so
    many seconds in any case: the exception can leave code that it interrupted, a compiler's say, waiting for a lock.
    """

    def end(number: int, frame: FrameType | None) -> None:
        _once_only()
        last = threading.Timer(seconds, os._exit, [128 + number])
        last.daemon = True
        last.start()
        raise SystemExit(128 + number)

    before = handle_signals(end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _once_only() -> None:
    """From now on another Ctrl-C ends the process at once, and other signals do nothing."""
    time.sleep(0.2)  # `timeout` sends its signal twice
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


class Interrupts(Callback):
    """Once a step is done, a signal does not end the stage: it waits for Checkpoints, which saves and calls `end`."""

    def __init__(self, name: str):
        self.name, self.number, self.stepped = name, 0, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}  # Lightning sets its own after this

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.alone, self.first = trainer.world_size == 1, trainer.is_global_zero
        # In place of Lightning's, which would broadcast from within the handler. Lightning restores those of before.
        handle_signals(self._received)

    def on_train_batch_end(self, *_: object) -> None:
        self.stepped = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self.stepped and self.alone:  # there is nothing to save
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
            return
        if not self.number:
            _once_only()
        self.number = number
        if self.first:
            words = f"\n{self.name}: {signal.Signals(number).name}: saving a checkpoint; Ctrl-C ends at once\n"
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(2, words.encode())  # a handler may not write to a stream that it interrupted

    def end(self, trainer: pl.Trainer) -> None:
        """Raises SystemExit in all processes when any of them received a signal; all have to take part."""
        received = torch.tensor(float(self.number), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number:
            if trainer.is_global_zero:
                words = "%s: ended by %s; the checkpoint of step %d is saved"
                log.info(words, self.name, signal.Signals(number).name, trainer.global_step)
            raise SystemExit(128 + number)
