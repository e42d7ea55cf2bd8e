"""The files of a zip, a tar or a folder as streams, one after the other; nothing is written.

Sizes in headers are not trusted: bytes are counted as they are read.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clip_gen.data.file_kinds import ARCHIVE, HEAD_BYTES, NO_PICTURE, TAR_MARK, WEB_PAGE, PictureError, kind_of
from clip_gen.data.limits import ArchiveError, Limits, Meter
from clip_gen.data.tars import tar_files
from clip_gen.data.zips import READ_METHODS, ZIP_ERRORS, open_member, open_zip

LINK = "a link"
NOT_A_FILE = "not a plain file"
ENCRYPTED = "encrypted"
UNKNOWN_METHOD = "compressed in a way that is not read: zip again as Deflate, or give the folder"
THUMBNAIL = "a thumbnail"
UNREADABLE = "cannot be read"

WANTED = "give a zip, a tar (plain, gz, bz2 or xz) or a folder of pictures"
DOWNLOAD_AGAIN = "download the archive itself; a browser that is logged in can do so where a page asks for a login"

# Files made by file managers. They are not listed as skipped.
LITTER = {"__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
THUMBNAIL_FOLDERS = {"thumbnails", "thumbs", "@eadir"}

ZIP_STARTS = (b"PK\3\4", b"PK\5\6")
UNREAD_ARCHIVES = {b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Entry:
    """A file in an archive: its name, and its content or the reason why it is skipped."""

    name: str
    content: Content | None = None
    reason: str = ""
    detail: str = ""


class UnreadableError(Exception):
    """The content of this entry is damaged; other entries may be intact."""


class Content:
    """Content of one entry, counted. read() raises UnreadableError for damage, ArchiveError beyond the limits."""

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
    """Content in a tar, which counts bytes itself. Damage makes the rest of the tar unreadable: ArchiveError."""

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (tarfile.TarError, OSError) as error:
            raise _damaged(self._meter.source, error) from error


def entries(source: Path, limits: Limits) -> Iterator[Entry]:
    """All files except litter, in the order of the archive, or of names in a folder.

    Read an entry's content before the next entry is requested. ArchiveError if the source is damaged, over a limit, or
    not an archive of a known kind.
    """
    if source.is_dir():
        files = _folder_entries(source, Meter(source, limits))
    elif source.is_file():
        files = _archive_entries(source, limits)
    else:
        raise ArchiveError(f"{source}: no such file or folder; {WANTED}")
    for entry in files:
        if is_litter(entry.name):
            continue
        small = THUMBNAIL_FOLDERS.intersection(_parts(entry.name)) or entry.name.lower().endswith(".thm")
        yield Entry(entry.name, reason=THUMBNAIL) if small else entry


def is_litter(name: str) -> bool:
    """Whether a file of this name is hidden or made by a file manager."""
    return any(part in LITTER or (part.startswith(".") and part != "..") for part in _parts(name))


def _parts(name: str) -> list[str]:
    return [part.lower() for part in PurePosixPath(name.replace("\\", "/")).parts]


def reason_of(error: Exception) -> str:
    """The message of an error, for an OSError without its path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _damaged(source: Path, error: Exception) -> ArchiveError:
    return ArchiveError(f"{source}: is damaged or cut off ({reason_of(error)}); make it or copy it again")


def _archive_entries(source: Path, limits: Limits) -> Iterator[Entry]:
    try:
        meter = Meter(source, limits)
        with source.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise ArchiveError(f"{source}: cannot be opened ({reason_of(error)}); {WANTED}") from error
    _check_is_archive(source, head)
    return _zip_entries(source, meter) if head.startswith(ZIP_STARTS) else _tar_entries(source, meter)


def _check_is_archive(source: Path, head: bytes) -> None:
    """ArchiveError if the file is clearly something else than an archive, or an archive of an unsupported kind."""
    if head[TAR_MARK] == b"ustar":
        return
    for start, packer in UNREAD_ARCHIVES.items():
        if head.startswith(start):
            raise ArchiveError(f"{source}: is packed with {packer}, which is not read; unpack it and give the folder")
    remedy = WANTED
    try:
        what = f"one picture ({kind_of(head, source.name)})"
    except PictureError as error:
        if error.reason in (ARCHIVE, NO_PICTURE):
            return  # reading it will show what it is
        what = error.reason.split(":")[0]
        remedy = DOWNLOAD_AGAIN if error.reason == WEB_PAGE else WANTED
    raise ArchiveError(f"{source}: is {what}, not an archive; {remedy}")


def folder_files(
    source: Path, on_error: Callable[[OSError], None] | None = None, count: Callable[[int], None] | None = None
) -> Iterator[Path]:
    """All files below a folder in the order of names, without hidden folders.

    Each folder is read once. A link to a folder inside the source is followed; a link to any other folder is returned
    like a file. `count` is called with the number of files of each folder before they are returned.
    """
    root = os.path.realpath(source)
    seen = {root}
    for folder, folders, files in os.walk(source, onerror=on_error, followlinks=True):
        if count is not None:
            count(len(files))
        paths = [os.path.join(folder, name) for name in sorted(folders) if name[0] != "."]
        read, links = [], []
        for path in sorted(paths, key=os.path.islink):  # folders before links to them
            target = os.path.realpath(path)
            if target not in seen and _is_inside(target, root):
                seen.add(target)
                read.append(os.path.basename(path))
            elif os.path.islink(path):
                links.append(os.path.basename(path))
        folders[:] = sorted(read)
        yield from (Path(folder, name) for name in sorted(files + links))


def _is_inside(target: str, root: str) -> bool:
    return os.path.commonpath([target, root]) == root


def _folder_entries(source: Path, meter: Meter) -> Iterator[Entry]:
    unread: list[OSError] = []
    root = os.path.realpath(source)
    for path in folder_files(source, unread.append, meter.add_entries):
        yield from _file_entry(path, path.relative_to(source).as_posix(), root, meter)
    for error in unread:
        yield Entry(Path(error.filename).relative_to(source).as_posix(), reason=UNREADABLE, detail=reason_of(error))


def _file_entry(path: Path, name: str, root: str, meter: Meter) -> Iterator[Entry]:
    """One entry. A generator, so that the file is open only while it is read."""
    try:
        if path.is_symlink() and (detail := _refused_link(path, root)):
            yield Entry(name, reason=LINK, detail=detail)
            return
        if not stat.S_ISREG(path.stat().st_mode):
            yield Entry(name, reason=NOT_A_FILE)
            return
        file = path.open("rb")
    except OSError as error:
        yield Entry(name, reason=UNREADABLE, detail=reason_of(error))
        return
    with file:
        yield Entry(name, Content(file, meter))


def _refused_link(path: Path, root: str) -> str:
    """Why a link is not followed; "" for a link to a file inside the folder."""
    target = os.path.realpath(path)
    if not _is_inside(target, root):
        return "it leads out of the folder"
    if not os.path.exists(target):
        return "it leads nowhere"
    return "its folder is read already" if os.path.isdir(target) else ""


def _tar_entries(source: Path, meter: Meter) -> Iterator[Entry]:
    members = 0
    with source.open("rb") as file:
        try:
            for member, content in tar_files(file, meter.add_bytes):
                meter.add_entries(1)
                members += 1
                if content is not None:
                    yield Entry(member.name, _TarContent(content, meter))
                elif not member.isdir():
                    yield Entry(member.name, reason=LINK if member.issym() or member.islnk() else NOT_A_FILE)
        except (tarfile.TarError, OSError) as error:
            if members:
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
    """One entry. A generator, so that the member is open only while it is read."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        yield Entry(name, reason=LINK if kind == stat.S_IFLNK else NOT_A_FILE)
    elif member.flag_bits & 1:
        yield Entry(name, reason=ENCRYPTED)
    elif member.compress_type not in READ_METHODS:
        yield Entry(name, reason=UNKNOWN_METHOD, detail=f"method {member.compress_type}")
    else:
        try:
            content = open_member(archive, member)
        except ZIP_ERRORS as error:
            yield Entry(name, reason=UNREADABLE, detail=reason_of(error))
            return
        with content:
            yield Entry(name, Content(content, meter))
