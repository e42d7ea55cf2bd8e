"""Limits on what an archive may hold, and a meter that counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_gen.data.decoding import MAX_PIXELS


class ArchiveError(ValueError):
    """The source has no usable pictures. The message says what it is and what to give instead."""


@dataclass(frozen=True)
class Limits:
    """Limits on pictures and archives.

    Pictures outside the first four limits are skipped. Archives and folders outside the others are refused.
    """

    min_side: int = 16  # pixels
    max_aspect: float = 16.0  # longer side / shorter side; training uses squares of the shorter side
    max_pixels: int = MAX_PIXELS  # of one picture
    max_file_bytes: int = 2**28  # of one picture file
    min_pictures: int = 8
    max_entries: int = 150_000  # 50,000 pictures, each with a file under __MACOSX and a text file
    max_bytes: int = 50 * 2**30  # unpacked
    max_ratio: float = 200.0  # unpacked / packed bytes; pictures hardly shrink, flat bitmaps up to 100 times
    free_bytes: int = 2**28  # unpacked bytes to which max_ratio does not apply


class Meter:
    """Counts the entries and bytes read from an archive; ArchiveError when there are too many."""

    def __init__(self, source: Path, limits: Limits):
        self.source, self._limits = source, limits
        self._packed = None if source.is_dir() else source.stat().st_size
        self._bytes = self._entries = 0

    def add_entries(self, count: int) -> None:
        self._entries += count
        self.check_entries(self._entries)

    def check_entries(self, count: int) -> None:
        if count > self._limits.max_entries:
            raise self._too_much(f"{self._limits.max_entries:,} files")

    def add_bytes(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._limits.max_bytes:
            raise self._too_much(f"{self._limits.max_bytes:,} bytes unpacked")
        ratio = self._limits.max_ratio
        if self._packed is not None and self._bytes > max(self._limits.free_bytes, ratio * self._packed):
            raise self._too_much(f"{ratio:g} times its own size, as archive bombs do")

    def _too_much(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self.source}: holds more than {what}; give fewer pictures")
