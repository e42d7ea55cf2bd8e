"""The files of a zip, a tar or a folder in pieces, one after the other; nothing is written.

Sizes in headers are not trusted: bytes are counted as they are read.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from clip_gen.data.file_kinds import ARCHIVE, HEAD_BYTES, NO_PICTURE, TAR_MARK, WEB_PAGE, UnusableError, kind_of
from clip_gen.data.limits import CHUNK, WANTED, ArchiveError, Limits, Meter, reason_of
from clip_gen.data.tars import tar_members
from clip_gen.data.zips import READ_METHODS, open_zip, unpacked_pieces

LINK = "a link"
NOT_A_FILE = "not a plain file"
ENCRYPTED = "encrypted: zip again without a password"
UNKNOWN_METHOD = "compressed in a way that is not read: zip again as Deflate, or give the folder"
THUMBNAIL = "a thumbnail"
UNREADABLE = "cannot be read"

DOWNLOAD_AGAIN = "download the archive itself; a browser that is logged in can do so where a page asks for a login"

# Files made by file managers. They are not listed as skipped.
LITTER = {"__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
THUMBNAIL_FOLDERS = {"thumbnails", "thumbs", "@eadir"}

ZIP_STARTS = (b"PK\3\4", b"PK\5\6")
UNREAD_ARCHIVES = {b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Entry:
    """A file in an archive: its name, and its content in pieces or the reason why it is skipped.

    The pieces raise UnusableError if this file is damaged, and ArchiveError if the archive is, or beyond a limit.
    """

    name: str
    pieces: Iterator[bytes] | None = None
    error: UnusableError | None = None


def entries(source: Path | Sequence[Path], limits: Limits) -> Iterator[Entry]:
    """All files except litter, in the order of the archive, or of names in a folder.

    Several sources may include pictures; the name of each source comes before the names of its files. Read an entry's
    pieces before the next entry is requested. ArchiveError if a source is damaged, over a limit, or of no known kind.
    """
    if not isinstance(source, Path):
        for one in source:
            is_picture = one.is_file() and _is_picture(one)
            for entry in _picture_entry(one, limits) if is_picture else entries(one, limits):
                yield entry if is_picture else replace(entry, name=f"{one.name}/{entry.name}")
        return
    for entry in _folder_entries(source, limits) if source.is_dir() else _file_entries(source, limits):
        if is_litter(entry.name):
            continue
        small = THUMBNAIL_FOLDERS.intersection(_parts(entry.name)) or entry.name.lower().endswith(".thm")
        yield Entry(entry.name, error=UnusableError(THUMBNAIL)) if small else entry


def is_litter(name: str) -> bool:
    """Whether a file of this name is hidden or made by a file manager."""
    return any(part in LITTER or (part.startswith(".") and part != "..") for part in _parts(name))


def _parts(name: str) -> list[str]:
    return [part.lower() for part in PurePosixPath(name.replace("\\", "/")).parts]


def _is_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            kind_of(file.read(HEAD_BYTES), path.name)
    except (UnusableError, OSError):
        return False
    return True


def _picture_entry(path: Path, limits: Limits) -> Iterator[Entry]:
    yield Entry(path.name, _counted(_file_pieces(path), Meter(str(path), limits)))


def _file_entries(source: Path, limits: Limits) -> Iterator[Entry]:
    if not source.is_file():
        raise ArchiveError(f"{source}: no such file or folder; {WANTED}")
    try:
        with source.open("rb") as file:
            yield from archive_entries(file, Meter(str(source), limits, source.stat().st_size))
    except OSError as error:
        raise ArchiveError(f"{source}: cannot be opened ({reason_of(error)}); {WANTED}") from error


def archive_entries(file: BinaryIO, meter: Meter) -> Iterator[Entry]:
    """All files of a zip or a tar, from an open file that can seek; otherwise like `entries`."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    _check_is_archive(meter.name, head)
    if head.startswith(ZIP_STARTS):
        archive = open_zip(file, meter)
        for member in archive.filelist:
            if not member.filename.replace("\\", "/").endswith("/"):
                yield Entry(member.filename, _counted(unpacked_pieces(archive, member), meter), _zip_error(member))
        return
    for member, pieces in tar_members(file, meter):
        meter.add_entries(1)
        if member.isreg() and not member.issparse():
            yield Entry(member.name, pieces)
        elif not member.isdir():
            yield Entry(member.name, error=UnusableError(LINK if member.issym() or member.islnk() else NOT_A_FILE))


def _check_is_archive(name: str, head: bytes) -> None:
    """ArchiveError if the file is clearly something else than an archive, or an archive of an unsupported kind."""
    if head[TAR_MARK] == b"ustar":
        return
    for start, packer in UNREAD_ARCHIVES.items():
        if head.startswith(start):
            raise ArchiveError(f"{name}: is packed with {packer}, which is not read; unpack it and give the folder")
    remedy = WANTED
    try:
        what = f"one picture ({kind_of(head, name)})"
    except UnusableError as error:
        if error.reason in (ARCHIVE, NO_PICTURE):
            return  # reading it will show what it is
        what = error.reason.split(":")[0]
        remedy = DOWNLOAD_AGAIN if error.reason == WEB_PAGE else WANTED
    raise ArchiveError(f"{name}: is {what}, not an archive; {remedy}")


def _zip_error(member: zipfile.ZipInfo) -> UnusableError | None:
    """Why a file of a zip is skipped."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return UnusableError(LINK if kind == stat.S_IFLNK else NOT_A_FILE)
    if member.flag_bits & 1:
        return UnusableError(ENCRYPTED)
    if member.compress_type not in READ_METHODS:
        return UnusableError(UNKNOWN_METHOD, f"method {member.compress_type}")
    return None


def _counted(pieces: Iterator[bytes], meter: Meter) -> Iterator[bytes]:
    """The same pieces. UnusableError if they cannot be read; other files may be intact."""
    while True:
        try:
            piece = next(pieces, None)
        except Exception as error:
            raise UnusableError(UNREADABLE, reason_of(error)) from error
        if piece is None:
            return
        meter.add_bytes(len(piece))
        yield piece


def folder_files(source: Path, on_error: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """All files below a folder in the order of names, without hidden folders.

    Each folder is read once. A link to a folder inside the source is followed; a link to any other folder is returned
    like a file.
    """
    root = os.path.realpath(source)
    seen = {root}
    for folder, folders, files in os.walk(source, onerror=on_error, followlinks=True):
        links = {name for name in folders if os.path.islink(os.path.join(folder, name))}
        read = set()
        for name in sorted(folders, key=lambda name: (name in links, name)):  # folders before links to them
            target = os.path.realpath(os.path.join(folder, name))
            if name[0] != "." and target not in seen and _is_inside(target, root):
                seen.add(target)
                read.add(name)
        folders[:] = sorted(read)
        yield from (Path(folder, name) for name in sorted({*files, *links} - read))


def _is_inside(target: str, root: str) -> bool:
    return os.path.commonpath([target, root]) == root


def _folder_entries(source: Path, limits: Limits) -> Iterator[Entry]:
    meter, root = Meter(str(source), limits), os.path.realpath(source)
    unread: list[OSError] = []
    for path in folder_files(source, unread.append):
        meter.add_entries(1)
        error = _file_error(path, root)
        yield Entry(path.relative_to(source).as_posix(), _counted(_file_pieces(path), meter), error)
    for error in unread:
        name = Path(error.filename).relative_to(source).as_posix()
        yield Entry(name, error=UnusableError(UNREADABLE, reason_of(error)))


def _file_error(path: Path, root: str) -> UnusableError | None:
    """Why a file of a folder is skipped. A link is followed to a file inside the folder only."""
    target = os.path.realpath(path)
    if os.path.islink(path):
        if not _is_inside(target, root):
            return UnusableError(LINK, "its target is outside the folder")
        if not os.path.exists(target):
            return UnusableError(LINK, "its target does not exist")
        if os.path.isdir(target):
            return UnusableError(LINK, "its folder is read already")
    return UnusableError(NOT_A_FILE) if os.path.exists(target) and not os.path.isfile(target) else None


def _file_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece
