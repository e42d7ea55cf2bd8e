"""What a server keeps between predictions: loaded models, and the folders their pictures lie in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from clip_gen.images import save_image
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.serving.request_weights import BusyError, RequestRules
from clip_gen.weights.model_folder import ModelFolderError
from clip_gen.weights.tarball import open_weights, shortened
from clip_gen.weights.url import is_url

# More than there are slots: a thread whose request was cancelled leaves within a second, but not while it connects.
FETCHING_THREADS = 32
WAIT_SECONDS = 60  # for a model in memory to become free for other weights


@dataclass
class _Loaded:
    """A model in memory, or one that is being loaded, and how many requests use it or wait for it."""

    key: tuple[Path, int]
    model: Future[ClipGen] = field(default_factory=Future)
    users: int = 0


class Models:
    """The model that a server started with, and the few others that requests named last.

    others: how many besides the server's own are in memory at most, those being loaded or used included. A request for
    more waits wait_seconds at most. rules: which weights requests may name; from the environment if not given. Set the
    attribute to None where no stranger sends the requests, as in script/predict.
    """

    def __init__(
        self,
        default_model: str | Path,
        others: int = 2,
        rules: RequestRules | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ):
        self.rules: RequestRules | None = rules or RequestRules.from_environment()
        self.own = ClipGen.load(default_model)
        self._most, self._wait_seconds = others, wait_seconds
        self._loaded: OrderedDict[tuple[Path, int], _Loaded] = OrderedDict()  # used longest ago first
        self._changed = threading.Condition()
        self._fetching = ThreadPoolExecutor(FETCHING_THREADS, "fetching")

    @contextlib.asynccontextmanager
    async def borrow(self, weights: str | None, should_stop: Callable[[], bool]) -> AsyncIterator[ClipGen]:
        """The server's own model for None or "", else that of the weights a request names, which stays in memory
        meanwhile.

        ModelFolderError for weights that cannot be used, and soon after should_stop says so. A download takes none of
        the threads that asyncio.to_thread draws in.
        """
        if not weights:
            yield self.own
            return
        taking = self._fetching.submit(self._take, weights, should_stop)
        try:
            loaded = await asyncio.wrap_future(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._give_back_late)
            raise
        try:
            yield loaded.model.result()
        finally:
            self._give_back(loaded)

    def _take(self, weights: str, should_stop: Callable[[], bool]) -> _Loaded:
        """The model of these weights, loaded, with one user more."""
        source = self.rules.open(weights, should_stop) if self.rules else open_weights(weights, should_stop)
        # A folder trained anew is another model.
        key = (source.path, max(file.lstat().st_mtime_ns for file in source.path.iterdir()))
        loaded, is_new = self._place(key, should_stop)
        try:
            if is_new:
                loaded.model.set_result(ClipGen.load(source))
            loaded.model.result()
        except BaseException as error:
            if is_new:
                with self._changed:
                    del self._loaded[key]
                loaded.model.set_exception(error)
            self._give_back(loaded)
            source.close()  # the error's traceback would keep the folder locked until the next garbage collection
            if isinstance(error, ModelFolderError) and is_url(weights):  # not where the server keeps them
                raise ModelFolderError(str(error).replace(str(source.path), shortened(weights))) from None
            raise
        return loaded

    def _place(self, key: tuple[Path, int], should_stop: Callable[[], bool]) -> tuple[_Loaded, bool]:
        """The model of this key with one user more, and whether the caller has to load it.

        Waits until there is room for it; BusyError when there is none in time.
        """
        until = time.monotonic() + self._wait_seconds
        with self._changed:
            while (known := self._loaded.get(key)) is None and not self._makes_room():
                if should_stop() or time.monotonic() > until:
                    raise BusyError("the server is busy with other weights; try again later")
                self._changed.wait(timeout=0.2)
            loaded = self._loaded[key] = known or _Loaded(key)
            self._loaded.move_to_end(key)
            loaded.users += 1
        return loaded, known is None

    def _makes_room(self) -> bool:
        """Whether one more model may be loaded, perhaps in place of one that nobody uses."""
        if len(self._loaded) >= self._most:
            unused = next((key for key, loaded in self._loaded.items() if not loaded.users), None)
            if unused is None:
                return False
            del self._loaded[unused]
        return True

    def _give_back(self, loaded: _Loaded) -> None:
        with self._changed:
            loaded.users -= 1
            self._changed.notify_all()

    def _give_back_late(self, taking: Future[_Loaded]) -> None:
        """For a request that was cancelled before its model was loaded."""
        if not taking.cancelled() and taking.exception() is None:
            self._give_back(taking.result())


class Outputs:
    """A fresh folder of pictures for each prediction; only the newest are kept, or they would fill the disk.

    Cog reads a prediction's files as soon as run() has returned and frees its slot after that, and deletes nothing.
    So only the folders of the slots in use can be unread, and `kept` is more than twice their number.
    """

    def __init__(self, kept: int = 32):
        self._root = tempfile.TemporaryDirectory(prefix="clip-gen-", ignore_cleanup_errors=True)
        self._kept = kept
        self._folders: deque[Path] = deque()

    @property
    def folder(self) -> Path:
        """Where all of them lie, inside the temporary folder."""
        return Path(self._root.name)

    def save(
        self, generation: Generation, settings: dict[str, object] | None, output_format: str, quality: int
    ) -> list[Path]:
        """Writes out-0, out-1, ... best first, all of them or none. Each file has its settings, seed and score inside,
        unless the settings are None.
        """
        os.makedirs(self._root.name, exist_ok=True)  # whoever clears up /tmp may have taken it from an idle server
        folder = Path(tempfile.mkdtemp(dir=self._root.name))
        try:
            paths = []
            for i, (image, score) in enumerate(zip(generation.images, generation.scores, strict=True)):
                paths.append(folder / f"out-{i}.{output_format}")
                more = {"seed": generation.seed, "score": round(score, 4)}
                metadata = None if settings is None else settings | more
                save_image(image, paths[-1], output_format, quality, metadata)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._folders.append(folder)
        while len(self._folders) > self._kept:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        return paths
