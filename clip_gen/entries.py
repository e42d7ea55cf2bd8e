"""The files that a zip, a tar or a folder holds, one after the other as streams; nothing is written.

Sizes in headers are never believed: bytes are counted as they come, and too many end the reading.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clip_gen.limits import ArchiveError, Limits, Meter
from clip_gen.tars import tar_files
from clip_gen.zips import ZIP_ERRORS, open_zip

LINK = "a link"
NOT_A_FILE = "not a plain file"
ENCRYPTED = "encrypted"
UNKNOWN_METHOD = "compressed in a way that is not read"
THUMBNAIL = "a thumbnail"
UNREADABLE = "cannot be read"

WANTED = "give a zip, a tar (plain, gz, bz2 or xz) or a folder of pictures"

# What file managers leave behind; nobody meant it as a picture, so it is not even listed.
LITTER = {"__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
THUMBNAIL_FOLDERS = {"thumbnails", "thumbs", "@eadir"}

ZIP_STARTS = (b"PK\3\4", b"PK\5\6")


@dataclass(frozen=True)
class Entry:
    """A file in an archive: its name there, and either its content or the reason why there is none."""

    name: str
    content: Content | None = None
    reason: str = ""
    detail: str = ""


class UnreadableError(Exception):
    """The content of one entry is damaged; the others may be whole."""


class Content:
    """Bytes of one entry, counted; read() raises UnreadableError, or ArchiveError when all is lost."""

    def __init__(self, stream: io.IOBase, meter: Meter):
        self._stream, self._meter = stream, meter

    def read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except ZIP_ERRORS as error:
            raise UnreadableError(reason_of(error)) from error
        self._meter.add_bytes(len(data))
        return data


class _TarContent(Content):
    """Counted already, where the tar is unpacked; and nothing follows damage in a tar."""

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (tarfile.TarError, OSError) as error:
            raise _damaged(self._meter.source, error) from error


def entries(source: Path, limits: Limits) -> Iterator[Entry]:
    """Every file but litter, in the order of the archive or, in a folder, of names.

    A content must be read before the next entry is asked for. ArchiveError when the source is none of the kinds that
    are read, is damaged, or holds too much.
    """
    if source.is_dir():
        found = _folder_entries(source, Meter(source, limits))
    elif source.is_file():
        found = _archive_entries(source, limits)
    else:
        raise ArchiveError(f"{source}: there is no such file or folder; {WANTED}")
    for entry in found:
        if is_litter(entry.name):
            continue
        small = THUMBNAIL_FOLDERS.intersection(_parts(entry.name)) or entry.name.lower().endswith(".thm")
        yield Entry(entry.name, reason=THUMBNAIL) if small else entry


def is_litter(name: str) -> bool:
    """Whether a file of this name in an archive was left there by a file manager, or is hidden."""
    return any(part in LITTER or (part.startswith(".") and part != "..") for part in _parts(name))


def _parts(name: str) -> list[str]:
    return [part.lower() for part in PurePosixPath(name.replace("\\", "/")).parts]


def reason_of(error: Exception) -> str:
    """An error in words, without the paths that OSError shows."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _damaged(source: Path, error: Exception) -> ArchiveError:
    return ArchiveError(f"{source}: is damaged or cut off ({reason_of(error)}); make or send it again")


def _archive_entries(source: Path, limits: Limits) -> Iterator[Entry]:
    try:
        meter = Meter(source, limits)
        with source.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise ArchiveError(f"{source}: cannot be opened ({reason_of(error)}); {WANTED}") from error
    if not start:
        raise ArchiveError(f"{source}: is an empty file; {WANTED}")
    return _zip_entries(source, meter) if start.startswith(ZIP_STARTS) else _tar_entries(source, meter)


def _folder_entries(source: Path, meter: Meter) -> Iterator[Entry]:
    unread: list[OSError] = []
    for folder, folders, files in os.walk(source, onerror=unread.append):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        meter.add_entries(len(files))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            path = Path(folder, name)
            yield from _file_entry(path, path.relative_to(source).as_posix(), meter)
    for error in unread:
        yield Entry(Path(error.filename).relative_to(source).as_posix(), reason=UNREADABLE, detail=reason_of(error))


def _file_entry(path: Path, name: str, meter: Meter) -> Iterator[Entry]:
    """One entry; a generator, since the file must stay open while it is read and no longer."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            yield Entry(name, reason=LINK if stat.S_ISLNK(mode) else NOT_A_FILE)
            return
        file = path.open("rb")
    except OSError as error:
        yield Entry(name, reason=UNREADABLE, detail=reason_of(error))
        return
    with file:
        yield Entry(name, Content(file, meter))


def _tar_entries(source: Path, meter: Meter) -> Iterator[Entry]:
    found = 0
    with source.open("rb") as file:
        try:
            for member, content in tar_files(file, meter.add_bytes):
                meter.add_entries(1)
                found += 1
                if content is not None:
                    yield Entry(member.name, _TarContent(content, meter))
                elif not member.isdir():
                    yield Entry(member.name, reason=LINK if member.issym() or member.islnk() else NOT_A_FILE)
        except (tarfile.TarError, OSError) as error:
            if found:
                raise _damaged(source, error) from error
            raise ArchiveError(
                f"{source}: is not an archive that can be read ({reason_of(error)}); {WANTED}"
            ) from error


def _zip_entries(source: Path, meter: Meter) -> Iterator[Entry]:
    try:
        with open_zip(source, meter) as archive:
            for member in archive.filelist:
                if not member.filename.replace("\\", "/").endswith("/"):
                    yield from _zip_entry(archive, member, meter)
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(source, error) from error


def _zip_entry(archive: zipfile.ZipFile, member: zipfile.ZipInfo, meter: Meter) -> Iterator[Entry]:
    """One entry; a generator, since the member must stay open while it is read and no longer."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        yield Entry(name, reason=LINK if kind == stat.S_IFLNK else NOT_A_FILE)
    elif member.flag_bits & 1:
        yield Entry(name, reason=ENCRYPTED)
    elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile unpacks bzip2 and LZMA without bounds: a few KB into GBs of memory at one read.
        yield Entry(name, reason=UNKNOWN_METHOD, detail=f"method {member.compress_type}")
    else:
        try:
            content = archive.open(member)
        except ZIP_ERRORS as error:
            yield Entry(name, reason=UNREADABLE, detail=reason_of(error))
            return
        with content:
            yield Entry(name, Content(content, meter))
