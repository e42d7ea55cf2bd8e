"""Zips, including Deflate64, with limits: Python's zipfile loads a table of contents of any length."""

from __future__ import annotations

import copy
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inflate64 import Inflater

from clip_gen.data.limits import ArchiveError, Meter

MAX_TABLE_BYTES = 2**28
LINE_START = b"PK\1\2"  # of each entry in the table
SMALL = 2**16  # bytes of content, or of a table with at most a thousand entries

DEFLATE64 = 9  # used by Windows for files over 2 GB
# zipfile unpacks bzip2 and LZMA without a limit: one read may turn a few KB into GBs.
READ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, DEFLATE64)
DEFLATE64_BYTES = 256  # packed bytes at a time, since inflate64 has no output limit: they unpack to at most 8 MB

# What zipfile raises on damaged files.
ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, LookupError, struct.error, zlib.error)


@contextmanager
def open_zip(source: Path, meter: Meter) -> Iterator[zipfile.ZipFile]:
    """Opens a zip and counts its entries. Read contents at most SMALL bytes at a time.

    Raises zipfile.BadZipFile if it is damaged or cut off, or if it is not a zip.
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
    """A zip file whose table of contents is checked before zipfile makes an object of each entry."""

    def __init__(self, source: Path, meter: Meter):
        super().__init__(io.FileIO(source))
        self._meter = meter

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size <= SMALL:
            return super().read(size)
        if size > MAX_TABLE_BYTES:
            raise zipfile.BadZipFile(f"its table of contents has {size:,} bytes")
        table = super().read(size)
        self._meter.check_entries(table.count(LINE_START))
        return table


def open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> io.BufferedIOBase:
    """The content of a member packed by one of READ_METHODS. Damage raises ZIP_ERRORS, now or on reading."""
    if member.compress_type != DEFLATE64:
        return archive.open(member)
    packed = copy.copy(member)  # as a stored member, so that zipfile returns the packed bytes
    packed.compress_type, packed.file_size, packed.CRC = zipfile.ZIP_STORED, member.compress_size, None
    return io.BufferedReader(_Deflate64(archive.open(packed), member.CRC))


class _Deflate64(io.RawIOBase):
    """Unpacks a Deflate64 stream in pieces and checks its checksum."""

    def __init__(self, packed: io.BufferedIOBase, checksum: int):
        self._packed, self._inflater, self._wanted = packed, Inflater(), checksum
        self._unpacked, self._checksum = io.BytesIO(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._unpacked.readinto(buffer)
        while not count and self._next_piece():
            count = self._unpacked.readinto(buffer)
        return count

    def _next_piece(self) -> bool:
        """Unpacks the next piece; False at the end."""
        if self._inflater.eof:
            if self._checksum != self._wanted:
                raise zipfile.BadZipFile("Bad CRC-32")
            return False
        piece = self._packed.read(DEFLATE64_BYTES)
        if not piece:
            raise EOFError("it is cut off")
        unpacked = self._inflater.inflate(piece)
        self._checksum = zlib.crc32(unpacked, self._checksum)
        self._unpacked = io.BytesIO(unpacked)
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()
