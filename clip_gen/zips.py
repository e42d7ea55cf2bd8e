"""Zips with a bounded table of contents: zipfile keeps all of it in memory, however long it is."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_gen.limits import ArchiveError, Meter

MOST_TABLE_BYTES = 2**28
LINE_START = b"PK\1\2"  # begins each line of the table
SMALL = 2**16  # bytes of content, or of a table with a thousand lines at most

# What zipfile raises on bytes that are not as they should be.
ZIP_ERRORS = (
    *(zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, LookupError, struct.error, zlib.error),
)


@contextmanager
def open_zip(source: Path, meter: Meter) -> Iterator[zipfile.ZipFile]:
    """The zip, with its files counted by the meter; read their contents at most SMALL bytes at a time.

    Raises zipfile.BadZipFile when it is damaged, cut off, or none.
    """
    with _BoundedTable(source, meter) as file:
        try:
            archive = zipfile.ZipFile(file)
        except ArchiveError:
            raise
        except ZIP_ERRORS as error:
            raise zipfile.BadZipFile(str(error)) from error
        meter.add_entries(len(archive.filelist))
        yield archive


class _BoundedTable(io.BufferedReader):
    """A zip file that looks through its table of contents before zipfile makes an object of every line."""

    def __init__(self, source: Path, meter: Meter):
        super().__init__(io.FileIO(source))
        self._meter = meter

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size <= SMALL:
            return super().read(size)
        if size > MOST_TABLE_BYTES:
            raise zipfile.BadZipFile(f"its table of contents has {size:,} bytes")
        table = super().read(size)
        self._meter.check_entries(table.count(LINE_START))
        return table
