"""The picture files of predictions."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from pathlib import Path

from clip_gen.images import save_image
from clip_gen.pipeline import Generation


class Outputs:
    """A new folder of pictures for each prediction. Only the newest `kept` folders stay, to save disk space.

    Cog reads a prediction's files after run() has returned, then frees its slot, and deletes no files. So only the
    folders of the slots in use may still be read, and `kept` is more than twice the number of slots.
    """

    def __init__(self, kept: int = 32):
        self._root = tempfile.TemporaryDirectory(prefix="clip-gen-", ignore_cleanup_errors=True)
        self._kept = kept
        self._folders: deque[Path] = deque()

    @property
    def folder(self) -> Path:
        """The folder that holds the others."""
        return Path(self._root.name)

    def save(
        self, generation: Generation, settings: dict[str, object] | None, output_format: str, quality: int
    ) -> list[Path]:
        """Writes out-0, out-1, ..., best first; all of them or none. Settings, seed and score go into each file, unless
        settings is None.
        """
        self.folder.mkdir(parents=True, exist_ok=True)  # an idle server's folder may have been cleaned up
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        paths = [folder / f"out-{i}.{output_format}" for i in range(len(generation.images))]
        try:
            for path, image, score in zip(paths, generation.images, generation.scores, strict=True):
                result = {"seed": generation.seed, "score": round(score, 4)}
                save_image(image, path, output_format, quality, None if settings is None else settings | result)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._folders.append(folder)
        while len(self._folders) > self._kept:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        return paths
