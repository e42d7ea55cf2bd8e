"""Weights that HTTP requests name. Strangers send them, so they must not reach the server's files and networks."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from clip_gen.files import shortened
from clip_gen.weights.cache import CacheError, WeightsFolder
from clip_gen.weights.model_folder import ModelFolderError
from clip_gen.weights.tarball import NotWeightsError, open_weights
from clip_gen.weights.url import PublicOnly, is_url

log = logging.getLogger(__name__)

SETTING = "CLIP_GEN_ALLOW_WEIGHTS"
# The same answer whatever the reason, because the reason would reveal which files and servers exist.
REFUSALS = {
    "none": f"this server takes no weights from requests ({SETTING}=none); leave them out",
    "https": "these weights cannot be used; give the https URL of a weights tar on a public server, or the tar itself "
    "as a data URL. The server's log has the reason",
    "any": "these weights cannot be used; give the path or URL (http, https, data) of a weights tar or a model folder. "
    "The server's log has the reason",
}
MAX_DOWNLOADS = 2  # at once
WAIT_SECONDS = 60  # for other downloads to end

_downloads = threading.Semaphore(MAX_DOWNLOADS)  # shared by all predictions and trainings of this process


class RefusedWeightsError(ModelFolderError):
    """Weights that a request may not name, or that cannot be opened; the message does not say which."""


class BusyError(ModelFolderError):
    """The server is loading other weights; the same request may succeed later."""


@dataclass(frozen=True)
class RequestRules:
    """Which weights a request may name (none, https or any), and how many are fetched at once."""

    allowed: str = "https"
    public: PublicOnly = field(default_factory=PublicOnly)
    downloads: threading.Semaphore = _downloads
    wait_seconds: float = WAIT_SECONDS

    @classmethod
    def from_environment(cls) -> RequestRules:
        """The rules that CLIP_GEN_ALLOW_WEIGHTS sets. ValueError for an unknown value."""
        allowed = os.environ.get(SETTING) or "https"
        if allowed not in REFUSALS:
            raise ValueError(f"{SETTING} is {shortened(allowed)}; give one of {', '.join(REFUSALS)}")
        return cls(allowed)

    def open(self, weights: str, should_stop: Callable[[], bool] | None = None) -> WeightsFolder:
        """Like weights.tarball.open_weights.

        RefusedWeightsError, always with the same message, for weights that cannot be opened. ModelFolderError for
        damaged weights, and when the server has no room or time for them.
        """
        public = None if self.allowed == "any" else self.public
        with contextlib.ExitStack() as downloading:
            wait = functools.partial(downloading.enter_context, self._download(should_stop))
            try:
                self._check(weights)
                return open_weights(weights, should_stop, public, needs_room=True, before_unpacking=wait)
            except NotWeightsError as error:
                _log(weights, error)
                raise RefusedWeightsError(REFUSALS[self.allowed]) from None
            except CacheError as error:
                _log(weights, error)
                raise CacheError("the server has no room for more weights now; try again later") from None

    def _check(self, weights: str) -> None:
        if self.allowed == "none":
            raise NotWeightsError(f"{SETTING} is none")
        if self.allowed == "https" and not is_url(weights):
            raise NotWeightsError(f"{SETTING} is https, and this is a path")

    @contextlib.contextmanager
    def _download(self, should_stop: Callable[[], bool] | None) -> Iterator[None]:
        """Waits until one of the downloads at once has ended. BusyError if that takes too long."""
        end = time.monotonic() + self.wait_seconds
        while not self.downloads.acquire(timeout=0.2):
            if time.monotonic() > end or (should_stop is not None and should_stop()):
                raise BusyError("the server is downloading other weights; try again later")
        try:
            yield
        finally:
            self.downloads.release()


async def fetched_base(base: str | None) -> WeightsFolder | None:
    """The model from which a training starts; None for "auto" and "". Raises the errors of RequestRules.open."""
    if base in (None, "", "auto"):
        return None
    stop = threading.Event()
    try:
        return await asyncio.to_thread(RequestRules.from_environment().open, base, stop.is_set)
    finally:
        stop.set()  # ends the download of a cancelled request


def _log(weights: str, error: Exception) -> None:
    """Writes to the server's log only: in a prediction's context Cog would send it to the client."""
    contextvars.Context().run(log.warning, "weights of a request, %r: %s", shortened(weights), error)
