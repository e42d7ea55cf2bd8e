"""The loaded models of a server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from clip_gen.files import shortened
from clip_gen.pipeline import ClipGen
from clip_gen.serving.request_weights import BusyError, RequestRules
from clip_gen.weights.model_folder import ModelFolderError
from clip_gen.weights.tarball import open_weights
from clip_gen.weights.url import is_url

# More than slots: the thread of a cancelled request ends within a second, but not while it connects to a host.
LOADING_THREADS = 32
WAIT_SECONDS = 60  # for a place in memory


@dataclass
class _Loaded:
    """A model that is loaded or being loaded, and the number of requests that use it or wait for it."""

    key: tuple[Path, int]
    model: Future[ClipGen] = field(default_factory=Future)
    users: int = 0


class Models:
    """The server's own model, and the others that requests named last.

    max_others: how many others are in memory at most, including those that are being loaded. A request for one more
    waits up to wait_seconds. rules: which weights requests may name; by default from the environment.
    """

    def __init__(
        self,
        default_model: str | Path,
        max_others: int = 2,
        rules: RequestRules | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ):
        self.rules: RequestRules | None = rules or RequestRules.from_environment()
        self.own = ClipGen.load(default_model)
        self._max_others, self._wait_seconds = max_others, wait_seconds
        self._loaded: OrderedDict[tuple[Path, int], _Loaded] = OrderedDict()  # least recently used first
        self._changed = threading.Condition()
        self._loading = ThreadPoolExecutor(LOADING_THREADS, "loading")

    @contextlib.asynccontextmanager
    async def borrow(self, weights: str | None, should_stop: Callable[[], bool]) -> AsyncIterator[ClipGen]:
        """The model of the weights that a request names, which stays in memory in the `with` block. The server's own
        model for None or "".

        ModelFolderError for weights that cannot be used, and soon after should_stop() returns True. Loading has its own
        threads, so a slow download delays no prediction.
        """
        if not weights:
            yield self.own
            return
        loading = self._loading.submit(self._load, weights, should_stop)
        try:
            loaded = await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(self._release_late)
            raise
        try:
            yield loaded.model.result()
        finally:
            self._release(loaded)

    def _load(self, weights: str, should_stop: Callable[[], bool]) -> _Loaded:
        """The loaded model of these weights, with one more user."""
        source = self.rules.open(weights, should_stop) if self.rules else open_weights(weights, should_stop)
        # A folder with newer files is another model.
        key = (source.path, max(file.lstat().st_mtime_ns for file in source.path.iterdir()))
        loaded, is_new = self._reserve(key, should_stop)
        try:
            if is_new:
                loaded.model.set_result(ClipGen.load(source))
            loaded.model.result()
        except BaseException as error:
            if is_new:
                with self._changed:
                    del self._loaded[key]
                loaded.model.set_exception(error)
            self._release(loaded)
            source.close()  # the error's traceback would keep the folder locked until the next garbage collection
            if isinstance(error, ModelFolderError) and is_url(weights):  # name the URL, not the cache's folder
                raise ModelFolderError(str(error).replace(str(source.path), shortened(weights))) from None
            raise
        return loaded

    def _reserve(self, key: tuple[Path, int], should_stop: Callable[[], bool]) -> tuple[_Loaded, bool]:
        """The model of this key with one more user, and whether the caller has to load it.

        Waits for room in memory; BusyError if there is none in time.
        """
        end = time.monotonic() + self._wait_seconds
        with self._changed:
            while (known := self._loaded.get(key)) is None and not self._has_room():
                if should_stop() or time.monotonic() > end:
                    raise BusyError("the server is busy with other weights; try again later")
                self._changed.wait(timeout=0.2)
            loaded = self._loaded[key] = known or _Loaded(key)
            self._loaded.move_to_end(key)
            loaded.users += 1
        return loaded, known is None

    def _has_room(self) -> bool:
        """Whether one more model may be loaded. Drops the least recently used model that has no users, if needed."""
        if len(self._loaded) >= self._max_others:
            unused = next((key for key, loaded in self._loaded.items() if not loaded.users), None)
            if unused is None:
                return False
            del self._loaded[unused]
        return True

    def _release(self, loaded: _Loaded) -> None:
        with self._changed:
            loaded.users -= 1
            self._changed.notify_all()

    def _release_late(self, loading: Future[_Loaded]) -> None:
        """For a request that was cancelled while its model was loading."""
        if not loading.cancelled() and loading.exception() is None:
            self._release(loading.result())
