"""Limits on what an archive may hold, and a meter that counts it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.error import URLError

from clip_gen.data.decoding import MAX_PIXELS
from clip_gen.files import shortened

CHUNK = 2**16  # bytes that are read at a time
WANTED = "give a zip, a tar (plain, gz, bz2 or xz) or a folder"


class ArchiveError(ValueError):
    """The archive or folder cannot be used. The message says what it is and what to give instead."""


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
    """Counts the files and unpacked bytes of an archive or folder; ArchiveError when there are too many.

    name: how messages call it. packed_bytes: its own size, to which max_ratio applies.
    """

    def __init__(self, name: str, limits: Limits, packed_bytes: float = float("inf")):
        self.name, self.bytes = name, 0
        self._limits, self._entries = limits, 0
        self._bomb_bytes = max(limits.free_bytes, limits.max_ratio * packed_bytes)

    def add_entries(self, count: int) -> None:
        self._entries += count
        self.check_entries(self._entries)

    def check_entries(self, count: int) -> None:
        if count > self._limits.max_entries:
            raise self._too_much(f"{self._limits.max_entries:,} files")

    def add_bytes(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self._limits.max_bytes:
            raise self._too_much(f"{self._limits.max_bytes:,} bytes unpacked")
        if self.bytes > self._bomb_bytes:
            raise self._too_much(f"{self._limits.max_ratio:g} times its own size, as archive bombs do")

    def damaged(self, error: Exception | str) -> ArchiveError:
        """The error for an archive that cannot be read."""
        what = f"is damaged, cut off or no archive ({reason_of(error)})"
        return ArchiveError(f"{self.name}: {what}; download or copy it again, or {WANTED}")

    def _too_much(self, what: str) -> ArchiveError:
        return ArchiveError(f"{self.name}: holds more than {what}; give fewer files")


def reason_of(error: Exception | str) -> str:
    """The message of an error, shortened; for an OSError without its path, for a URLError that of its cause."""
    if type(error) is URLError:
        return reason_of(error.reason)
    return shortened(getattr(error, "strerror", None) or str(error) or type(error).__name__)
