"""Reads a tar of any compression as a stream, and counts all unpacked bytes.

Python's tarfile trusts sizes in headers, keeps whole headers in memory, and takes damage for the end of the tar.
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

MAX_HEADER_BYTES = 2**20  # of one member, with its long names and pax records
MAX_XZ_MEMORY = 2**28  # four times what `xz -9` needs
CHUNK = 2**16

T = TypeVar("T")


def tar_files(
    stream: BinaryIO, count: Callable[[int], None]
) -> Iterator[tuple[tarfile.TarInfo, io.BufferedReader | None]]:
    """Each member, and its content if it is a plain file. Read the content before the next member is requested.

    count: called with the number of bytes of each read, headers and skipped content included; may raise to stop.
    Raises tarfile.TarError or OSError if the tar is damaged or cut off, or if it is not a tar.
    """
    forward = _Forward(_decompressed(io.BufferedReader(stream)), count)
    tar = forward.header(lambda: tarfile.TarFile(fileobj=forward))
    while (member := forward.header(tar.next)) is not None:
        yield member, tar.extractfile(member) if member.isreg() and not member.issparse() else None
        # tarfile would keep both for all members.
        tar.members.clear()
        tar.pax_headers.clear()
    if not forward.last or forward.last.strip(b"\0"):
        raise tarfile.ReadError("it is cut off or damaged: its end is missing")


def _decompressed(stream: io.BufferedReader) -> BinaryIO:
    start = stream.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(stream)
    if start.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(_Xz(stream))
    return stream


class _Forward:
    """A file for tarfile that only reads forward; only a malicious tar would seek back."""

    def __init__(self, stream: BinaryIO, count: Callable[[int], None]):
        self._stream, self._count = stream, count
        self._position = 0
        self._left: int | None = None  # bytes that the current header may still take
        self._stopped = False
        self.last = b""

    def header(self, read: Callable[[], T]) -> T:
        """Calls `read`, which may read at most MAX_HEADER_BYTES."""
        self._left = MAX_HEADER_BYTES
        try:
            return read()
        except RecursionError as error:  # tarfile recurses for each extended header
            raise tarfile.ReadError("it has too many headers in a row") from error
        except (ValueError, LookupError, OverflowError) as error:  # it parses any text in them as numbers
            if self._stopped:
                raise
            raise tarfile.ReadError("a header in it makes no sense") from error
        finally:
            self._left = None

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if size < 0:
            raise tarfile.ReadError("a size in it is below 0")
        if self._left is not None:
            self._left -= size
            if self._left < 0:
                raise tarfile.ReadError(f"a header in it is over {MAX_HEADER_BYTES:,} bytes")
        self.last = self._take(size)
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a size in it is wrong")
        while self._position < position and self._take(min(position - self._position, CHUNK)):
            pass

    def _take(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise tarfile.ReadError(str(error)) from error
        self._position += len(data)
        self._stopped = True  # stays True if count raises
        self._count(len(data))
        self._stopped = False
        return data


class _Xz(io.RawIOBase):
    """lzma.open with a memory limit: an xz file may require 4 GiB."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._decoder = stream, lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = b""
        while not data:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data or self._stream.read(CHUNK)
                if not packed:
                    return 0
                self._decoder = lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY)
            elif self._decoder.needs_input:
                packed = self._stream.read(CHUNK)
                if not packed:
                    raise EOFError("it is cut off")
            data = self._decoder.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)
