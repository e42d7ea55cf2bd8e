"""Reads a tar of any compression as a stream, and counts all unpacked bytes.

Python's tarfile trusts sizes in headers, keeps whole headers in memory, and takes damage for the end of the tar. So it
reads the headers only.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from clip_gen.data.limits import CHUNK, ArchiveError, Meter

MAX_HEADER_BYTES = 2**20  # of one member, with its long names and pax records
MAX_XZ_MEMORY = 2**28  # four times what `xz -9` needs

T = TypeVar("T")


def tar_members(file: BinaryIO, meter: Meter) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
    """Each member and its content in pieces. Read the content before the next member is requested.

    The meter counts headers and skipped content too. ArchiveError if the tar is damaged or cut off.
    """
    stream = _TarStream(_decompressed(file), meter)
    tar = stream.header(tarfile.TarFile, fileobj=stream)
    while (member := stream.header(tar.next)) is not None:
        yield member, stream.pieces(member.offset_data + member.size)
        for _ in stream.pieces(tar.offset):
            pass
        # tarfile would keep both for all members.
        tar.members.clear()
        tar.pax_headers.clear()
    stream.check_end()


def _decompressed(file: BinaryIO) -> BinaryIO:
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(_Xz(file))
    return file


class _TarStream:
    """An unpacked tar that is only read forward. tarfile calls `tell` and `read` for headers."""

    def __init__(self, file: BinaryIO, meter: Meter):
        self._file, self._meter = file, meter
        self._position = 0
        self._left = 0  # bytes that the current header may still take
        self._block = b""  # the last of a header

    def header(self, read: Callable[..., T], **arguments: object) -> T:
        """Calls `read`, in which tarfile reads a header of at most MAX_HEADER_BYTES."""
        self._left, start = MAX_HEADER_BYTES, self._position
        try:
            result = read(**arguments)
        except ArchiveError:
            raise
        except tarfile.TarError as error:
            raise self._meter.damaged(error) from error
        # It takes any text for numbers, and recurses for each extended header.
        except (ValueError, LookupError, OverflowError, RecursionError) as error:
            raise self._meter.damaged("a header in it makes no sense") from error
        self._meter.add_bytes(self._position - start)
        return result

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise self._meter.damaged(f"a header in it is over {MAX_HEADER_BYTES:,} bytes")
        self._block = self._take(size)
        return self._block

    def pieces(self, end: float) -> Iterator[bytes]:
        """The bytes from here to the position `end`."""
        while self._position < end and (piece := self._take(min(end - self._position, CHUNK))):
            self._meter.add_bytes(len(piece))
            yield piece
        if self._position != end:
            raise self._meter.damaged("a size in it is wrong, or its end is missing")

    def check_end(self) -> None:
        """ArchiveError unless the last header was a block of zeros. tarfile ends at a damaged header too."""
        if not self._block or self._block.strip(b"\0"):
            raise self._meter.damaged("its end is missing")
        while piece := self._take(CHUNK):
            self._meter.add_bytes(len(piece))
            if piece.strip(b"\0"):
                raise self._meter.damaged("something follows its end, such as another archive")

    def _take(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise self._meter.damaged(error) from error
        self._position += len(data)
        return data


class _Xz(io.RawIOBase):
    """lzma.open with a memory limit: an xz file may require 4 GiB."""

    def __init__(self, file: BinaryIO):
        self._file, self._decoder = file, lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = b""
        while not data:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data.lstrip(b"\0")  # zeros may follow a stream
                while not packed and (piece := self._file.read(CHUNK)):
                    packed = piece.lstrip(b"\0")
                if not packed:
                    return 0
                self._decoder = lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY)
            elif self._decoder.needs_input:
                packed = self._file.read(CHUNK)
                if not packed:
                    raise EOFError("it is cut off")
            data = self._decoder.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)
