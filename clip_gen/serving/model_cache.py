"""The loaded models of a server."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

from clip_gen.files import shortened
from clip_gen.pipeline import ClipGen
from clip_gen.serving.request_weights import BusyError, RequestRules
from clip_gen.weights.model_folder import ModelFolderError
from clip_gen.weights.url import is_url

# More than slots: the thread of a cancelled request ends within a second, but not while it connects to a host.
LOADING_THREADS = 32
WAIT_SECONDS = 60  # for a place in memory

Key = tuple[Path, int]  # folder and time of the last change


class Models:
    """The server's own model, and the others that requests named last.

    max_others: how many others are in memory at most, including those that are being loaded. A request for one more
    waits up to wait_seconds.
    """

    def __init__(self, default_model: str | Path, max_others: int = 2, wait_seconds: float = WAIT_SECONDS):
        self.rules = RequestRules.from_environment()
        self.own = ClipGen.load(default_model)
        self._max_others, self._wait_seconds = max_others, wait_seconds
        self._lock = threading.Lock()
        self._in_memory: WeakValueDictionary[Key, ClipGen] = WeakValueDictionary()  # kept by _recent and by predictions
        self._recent: OrderedDict[Key, ClipGen] = OrderedDict()  # least recently used first
        self._loading: set[Key] = set()
        self._threads = ThreadPoolExecutor(LOADING_THREADS, "loading")

    async def get(self, weights: str | None, should_stop: Callable[[], bool]) -> ClipGen:
        """The model of the weights that a request names; the server's own model for None or "".

        It counts as in memory as long as the caller has a reference to it. ModelFolderError for weights that cannot be
        used, and soon after should_stop() returns True. Loading has its own threads, so a slow download delays no
        prediction.
        """
        if not weights:
            return self.own
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._load, weights, should_stop)

    def _load(self, weights: str, should_stop: Callable[[], bool]) -> ClipGen:
        source = self.rules.open(weights, should_stop)
        # A folder with newer files is another model.
        key = (source.path, max(file.lstat().st_mtime_ns for file in source.path.iterdir()))
        end = time.monotonic() + self._wait_seconds
        while not self._reserve(key):
            if model := self._find(key):
                return model
            if should_stop() or time.monotonic() > end:
                raise BusyError("the server is busy with other weights; try again later")
            gc.collect()  # the error of a failed prediction refers to its model, and to itself
            time.sleep(0.1)
        try:
            model = ClipGen.load(source)
            with self._lock:
                self._in_memory[key] = model
            return self._find(key)
        except ModelFolderError as error:
            source.close()  # the error's traceback would keep the folder locked until the next garbage collection
            if not is_url(weights):
                raise
            # Names the URL, not the cache's folder.
            raise ModelFolderError(str(error).replace(str(source.path), shortened(weights))) from None
        finally:
            self._loading.discard(key)

    def _find(self, key: Key) -> ClipGen | None:
        """The model of this key, if it is in memory. It becomes the most recently used."""
        with self._lock:
            model = self._in_memory.get(key)
            if model is not None:
                self._recent[key] = model
                self._recent.move_to_end(key)
            return model

    def _reserve(self, key: Key) -> bool:
        """Reserves a place in memory, for which the caller has to load the model of this key.

        False if the model is in memory or being loaded, and if there is no place. Gives up the least recently used
        models, which then stay in memory only while predictions use them.
        """
        with self._lock:
            if key in self._in_memory or key in self._loading:
                return False
            while self._recent and len(self._in_memory) + len(self._loading) >= self._max_others:
                self._recent.popitem(last=False)
            if len(self._in_memory) + len(self._loading) >= self._max_others:
                return False
            self._loading.add(key)
            return True
