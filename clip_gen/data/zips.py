"""Zips, including Deflate64, with limits: Python's zipfile loads a table of contents of any length."""

from __future__ import annotations

import copy
import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from inflate64 import Inflater

from clip_gen.data.limits import CHUNK, ArchiveError, Meter

MAX_TABLE_BYTES = 2**28
LINE_START = b"PK\1\2"  # of each entry in the table

DEFLATE64 = 9  # used by Windows for files over 2 GB
# zipfile unpacks bzip2 and LZMA without a limit: one read may turn a few KB into GBs.
READ_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, DEFLATE64)
DEFLATE64_BYTES = 256  # packed bytes at a time, since inflate64 has no output limit: they unpack to at most 8 MB


def open_zip(file: BinaryIO, meter: Meter) -> zipfile.ZipFile:
    """Opens a zip and counts its entries. ArchiveError if it is damaged or cut off, or if it is not a zip."""
    try:
        archive = zipfile.ZipFile(_BoundedTable(file, meter))
    except ArchiveError:
        raise
    except Exception as error:  # damaged files make zipfile raise anything
        raise meter.damaged(error) from error
    meter.add_entries(len(archive.filelist))
    if min((member.header_offset for member in archive.filelist), default=0) > 0:
        raise meter.damaged("something precedes its first file, such as another archive")
    return archive


class _BoundedTable(io.BufferedReader):
    """A zip file whose table of contents is checked before zipfile makes an object of each entry."""

    def __init__(self, file: BinaryIO, meter: Meter):
        super().__init__(file)
        self._meter = meter

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size <= CHUNK:  # of a file, or a table with at most a thousand entries
            return super().read(size)
        if size > MAX_TABLE_BYTES:
            raise zipfile.BadZipFile(f"its table of contents has {size:,} bytes")
        table = super().read(size)
        self._meter.check_entries(table.count(LINE_START))
        return table


def unpacked_pieces(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a member packed by one of READ_METHODS. Raises any exception if it is damaged."""
    if member.compress_type == DEFLATE64:
        yield from _inflated64(archive, member)
        return
    with archive.open(member) as content:
        while piece := content.read(CHUNK):
            yield piece


def _inflated64(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    packed = copy.copy(member)  # as a stored member, so that zipfile returns the packed bytes
    packed.compress_type, packed.file_size, packed.CRC = zipfile.ZIP_STORED, member.compress_size, None
    inflater, checksum = Inflater(), 0
    with archive.open(packed) as content:
        while not inflater.eof:
            piece = content.read(DEFLATE64_BYTES)
            if not piece:
                raise EOFError("it is cut off")
            unpacked = inflater.inflate(piece)
            checksum = zlib.crc32(unpacked, checksum)
            yield unpacked
    if checksum != member.CRC:
        raise zipfile.BadZipFile("Bad CRC-32")
