"""Limits on what an archive may hold, and a meter that counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_gen.data.decoding import MOST_PIXELS


class ArchiveError(ValueError):
    """What was given holds no pictures that can be used; one sentence says what it is and what to give."""


@dataclass(frozen=True)
class Limits:
    """What an archive or folder must and may hold.

    A picture outside the first four is skipped; an archive or folder outside the others is refused.
    """

    least_side: int = 16  # pixels
    most_aspect: float = 16.0  # longer side by shorter; what is trained on are squares of the shorter side
    most_pixels: int = MOST_PIXELS  # of one picture
    most_file_bytes: int = 2**28  # of one picture file
    least_pictures: int = 8
    most_entries: int = 150_000  # 50,000 pictures, each with a shadow under __MACOSX and a text beside it
    most_bytes: int = 50 * 2**30  # unpacked
    most_ratio: float = 200.0  # unpacked bytes by packed bytes; pictures hardly shrink, flat bitmaps up to 100 times
    free_bytes: int = 2**28  # unpacked before the ratio counts


class Meter:
    """Counts what comes out of an archive and raises ArchiveError when it is too much."""

    def __init__(self, source: Path, limits: Limits):
        self.source, self._limits = source, limits
        self._packed = None if source.is_dir() else source.stat().st_size
        self._bytes = self._entries = 0

    def add_entries(self, count: int) -> None:
        self._entries += count
        self.check_entries(self._entries)

    def check_entries(self, count: int) -> None:
        if count > self._limits.most_entries:
            raise self._too_much(f"{self._limits.most_entries:,} files")

    def add_bytes(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._limits.most_bytes:
            raise self._too_much(f"{self._limits.most_bytes:,} bytes unpacked")
        ratio = self._limits.most_ratio
        if self._packed is not None and self._bytes > max(self._limits.free_bytes, ratio * self._packed):
            raise self._too_much(f"{ratio:g} times its own size, as archive bombs do")

    def _too_much(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self.source}: holds more than {what}; give fewer pictures")
