"""What a server keeps between predictions: loaded models, and the folders their pictures lie in."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from clip_gen.images import save_image
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.weights import resolve_weights

# More than there are slots: a thread whose request was cancelled leaves within a second, but not while it connects.
FETCHING_THREADS = 32


class Models:
    """The model a server started with, and the few others that requests named last."""

    def __init__(self, own_weights: str, others: int = 2):
        self.own = ClipGen.load(resolve_weights(own_weights))
        self._most = others
        self._loaded: OrderedDict[tuple[Path, int], Future[ClipGen]] = OrderedDict()
        self._lock = threading.Lock()
        self._fetching = ThreadPoolExecutor(FETCHING_THREADS, "fetching")

    async def fetch(self, weights: str | None, should_stop: Callable[[], bool]) -> ClipGen:
        """What get() gives; a download takes none of the threads that asyncio.to_thread draws in."""
        if not weights:
            return self.own
        return await asyncio.get_running_loop().run_in_executor(self._fetching, self.get, weights, should_stop)

    def get(self, weights: str | None, should_stop: Callable[[], bool] | None = None) -> ClipGen:
        """The server's own model for None or "", else that of these weights, whatever resolve_weights takes.

        Safe from several threads; a model asked for twice at once loads once. ModelFolderError for unusable weights,
        and soon after should_stop says so.
        """
        if not weights:
            return self.own
        folder = resolve_weights(weights, should_stop)
        # A folder trained anew is another model.
        key = (folder, max((file.stat().st_mtime_ns for file in folder.iterdir()), default=0))
        with self._lock:  # but not while loading, or who wants what is loaded already would wait for that
            known = self._loaded.pop(key, None)
            model = self._loaded[key] = known or Future()
            while len(self._loaded) > self._most:
                self._loaded.popitem(last=False)
        if known is None:
            try:
                model.set_result(ClipGen.load(folder))
            except BaseException as error:
                with self._lock:
                    if self._loaded.get(key) is model:
                        del self._loaded[key]
                model.set_exception(error)
        return model.result()


class Outputs:
    """A fresh folder of pictures for each prediction; only the newest are kept, or they would fill the disk.

    Cog reads a prediction's files as soon as run() has returned and frees its slot after that, and deletes nothing.
    So only the folders of the slots in use can be unread, and `kept` is more than twice their number.
    """

    def __init__(self, kept: int = 32):
        self._root = tempfile.TemporaryDirectory(prefix="clip-gen-", ignore_cleanup_errors=True)
        self._kept = kept
        self._folders: deque[Path] = deque()

    def save(self, generation: Generation, settings: dict[str, object], output_format: str, quality: int) -> list[Path]:
        """Writes out-0, out-1, ... best first, all of them or none, each with its settings, seed and score inside."""
        os.makedirs(self._root.name, exist_ok=True)  # whoever clears up /tmp may have taken it from an idle server
        folder = Path(tempfile.mkdtemp(dir=self._root.name))
        try:
            paths = []
            for i, (image, score) in enumerate(zip(generation.images, generation.scores, strict=True)):
                paths.append(folder / f"out-{i}.{output_format}")
                metadata = {**settings, "seed": generation.seed, "score": round(score, 4)}
                save_image(image, paths[-1], output_format, quality, metadata)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._folders.append(folder)
        while len(self._folders) > self._kept:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        return paths
