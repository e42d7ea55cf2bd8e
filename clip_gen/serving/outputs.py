"""The picture files of predictions."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from clip_gen.picture_files import write_pictures
from clip_gen.pipeline import Generation


class Outputs:
    """A new folder in `root` for the pictures of each prediction. Only the newest `kept` stay, to save disk space.

    Cog reads a prediction's files after run() has returned, then frees its slot, and deletes no files. So only the
    folders of the slots in use may still be read, and `kept` is more than twice the number of slots.
    """

    def __init__(self, root: Path, kept: int = 32):
        self.root, self._kept = root, kept
        self._folders: deque[Path] = deque()

    def save(
        self,
        generation: Generation,
        metadata: dict[str, object] | None,
        output_format: str,
        quality: int,
        grid: bool = False,
        enlarge: Callable[[Image.Image], Image.Image] = lambda image: image,
    ) -> list[Path]:
        """Writes out-0, out-1, ..., best first; all of them or none. metadata: goes into each file with its score.

        grid: also a contact sheet, out-grid, which comes first. enlarge: of `enlarger`.
        """
        self.root.mkdir(parents=True, exist_ok=True)  # an idle server's folder may have been cleaned up
        folder = Path(tempfile.mkdtemp(dir=self.root))
        self._folders.append(folder)
        if len(self._folders) > self._kept:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        paths = [folder / f"out-{i}.{output_format}" for i in range(len(generation.images))]
        sheet = folder / f"out-grid.{output_format}" if grid else None
        write_pictures(generation, paths, metadata, output_format, quality, sheet, enlarge)
        return [sheet, *paths] if sheet else paths
