"""Progress for people: a live line on a terminal, a few lines in the log of a prediction, and of many pictures."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clip_gen.sampling.progress import Progress

log = logging.getLogger(__name__)

LOG_SECONDS, LOG_SHARE = 1.0, 0.05  # of all tokens; between two lines of a log
LOG_FORM = "{l_bar}{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}<{remaining}, {rate_noinv_fmt}]"
BAR_FORM = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"
NOTHING = Progress(0, 1, 0.0)
COUNT_SECONDS = 30.0


class ProgressLog:
    """Writes lines about one request to standard error: at most 22, the last one at the end.

    They look like ` 45%|####4     | 1843/4096 tokens [00:04<00:05, 438.81 tokens/s]`. Replicate's page and its client
    libraries read percent, current and total from lines that begin so.
    """

    def __init__(self) -> None:
        self._shown = NOTHING

    def __call__(self, progress: Progress) -> None:
        seconds, tokens = progress.seconds - self._shown.seconds, progress.tokens - self._shown.tokens
        is_due = seconds >= LOG_SECONDS and (self._shown is NOTHING or tokens >= LOG_SHARE * progress.total_tokens)
        rounds_to_all = progress.tokens >= 0.995 * progress.total_tokens  # a line with 100 % is the last one
        if (is_due and not rounds_to_all) or (tokens and progress.tokens == progress.total_tokens):
            self._shown = progress
            sys.stderr.write(log_line(progress) + "\n")


def log_line(progress: Progress) -> str:
    numbers = progress.tokens, progress.total_tokens, progress.seconds
    return tqdm.format_meter(*numbers, ascii=True, bar_format=LOG_FORM, unit=" tokens")


class LiveBar:
    """One line on a terminal for `count` requests; it disappears at the end.

    Nothing if standard error is no terminal, or count is 0.
    """

    def __init__(self, count: int = 1):
        self.count, self._open, self._bar = count, ExitStack(), None
        self._requests: dict[object, Progress] = {}

    def __enter__(self) -> LiveBar:
        if self.count and sys.stderr.isatty():
            self._open.enter_context(logging_redirect_tqdm())
            bar = tqdm(total=self.count, bar_format=BAR_FORM, leave=False, dynamic_ncols=True)
            self._bar = self._open.enter_context(bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def listener(self) -> Callable[[Progress], None] | None:
        """The on_progress of another one of the requests."""
        if self._bar is None:
            return None
        request = object()
        return lambda progress: self._show(request, progress)

    def hidden(self) -> AbstractContextManager:
        """Hides the line, so that others can be printed above it."""
        return tqdm.external_write_mode()

    def _show(self, request: object, progress: Progress) -> None:
        with self._bar.get_lock():
            self._requests[request] = progress
            shares = [one.tokens / one.total_tokens for one in self._requests.values()]
            speed = sum(one.tokens for one in self._requests.values()) / self._bar.format_dict["elapsed"]
            done = f"{shares.count(1)} of {self.count} drawn, " if self.count > 1 else ""
            self._bar.n = sum(shares)
            self._bar.set_postfix_str(f"{done}{speed:.0f} tokens/s")


class CountLog:
    """Logs every half minute how many of `total` pictures or prompts are done, and how long the others take.

    before: how many were done by an earlier run.
    """

    def __init__(self, what: str, total: int, before: int = 0):
        self.what, self.total, self.before, self.done = what, total, before, before
        self.began = self.logged = time.monotonic()
        if before:
            log.info("%s: %s of %s were done before", what, f"{before:,}", f"{total:,}")

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.logged >= COUNT_SECONDS or self.done == self.total:
            speed = (self.done - self.before) / (now - self.began)
            left, numbers = (self.total - self.done) / speed / 60, f"{self.done:,} of {self.total:,}"
            log.info("%s: %s, %.2f a second, %.1f min left", self.what, numbers, speed, left)
            self.logged = now
