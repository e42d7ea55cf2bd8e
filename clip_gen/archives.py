"""A zip, a tar or a folder from anybody to a folder of usable pictures, each once.

Nothing in an archive chooses where a byte is written: files get names of ours, theirs are kept as text.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clip_gen.entries import ENCRYPTED, UNREADABLE, WANTED, Content, UnreadableError, entries, is_litter, reason_of
from clip_gen.files import digest_of
from clip_gen.findings import Pictures, Skipped, shown
from clip_gen.limits import ArchiveError, Limits
from clip_gen.pictures import NO_PICTURE, PictureError, kind_of, load_picture
from clip_gen.tars import CHUNK

log = logging.getLogger(__name__)

LIMITS = Limits()
UNPACKING = ".unpacking-"
LOG_EVERY = 2000  # files
STRIP = 256  # rows of a picture copied at once
THREADS = 2  # each may hold a decoded picture of Limits.most_pixels

DUPLICATE = "a duplicate"
NESTED = "an archive within the archive"
TOO_LARGE_A_FILE = "too large a file"
EMPTY = "an empty file"

# zip, gz, bz2, xz, 7z, rar, zstd
ARCHIVE_STARTS = (b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
TAR_MARK = slice(257, 262)


@dataclass(frozen=True)
class _Staged:
    """A file written but not looked at yet, with its name in the archive as it was there."""

    name: str
    path: Path


def unpack(source: Path, folder: Path, limits: Limits = LIMITS) -> Pictures:
    """Copies the usable pictures of a zip, a tar (plain, gz, bz2, xz) or a folder into a new or empty `folder`.

    They are called 000001.jpeg and so on in the order of their original names, so what is made depends on the names and
    contents alone. Of pictures with the same pixels the first is used, whatever kind of file they come in. The folder
    is there whole or not at all. ArchiveError when it cannot be made, or fewer than limits.least_pictures are of use.
    """
    _check_places(source, folder)
    part = folder.with_name(f"{UNPACKING}{folder.name}")
    try:
        with _writing(folder):
            shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
            part.mkdir(parents=True)
        staged, skipped = _stage(source, part, folder, limits)
        chosen = _choose(staged, skipped, limits)
        skipped.sort(key=lambda one: one.name)
        _check_enough(source, Pictures([one.path for one in chosen], skipped), limits)
        with _writing(folder):
            pictures = _publish(chosen, skipped, part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    log.info("%s: %s", source, pictures.summary())
    return pictures


def fingerprint(source: Path) -> str:
    """What tells an archive's content, or a folder's by the names and sizes of its files, from any other. "" for what
    cannot be read, of which `unpack` will tell.
    """
    try:
        if source.is_dir():
            sizes = {str(path.relative_to(source)): path.stat().st_size for path in source.rglob("*") if path.is_file()}
            lines = sorted(f"{name} {size}" for name, size in sizes.items() if not is_litter(name))
            return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
        if source.is_file():
            return digest_of(source)
    except OSError:
        pass
    return ""


def check_outside(source: Path, folder: Path) -> None:
    """ArchiveError for a folder inside the one whose pictures it is to hold."""
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ArchiveError(f"{folder}: is inside {source}, whose pictures it is to hold; name a folder elsewhere")


def _check_places(source: Path, folder: Path) -> None:
    if not source.exists():
        raise ArchiveError(f"{source}: there is no such file or folder; {WANTED}")
    check_outside(source, folder)
    with _writing(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise ArchiveError(f"{folder}: is there already; name a new or empty folder")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What goes wrong inside went wrong on our disk, not in the archive."""
    try:
        yield
    except OSError as error:
        full = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ArchiveError(f"{folder}: cannot be written to ({reason_of(error)}); {full}name another folder") from error


def _stage(source: Path, part: Path, folder: Path, limits: Limits) -> tuple[list[_Staged], list[Skipped]]:
    """Writes everything that begins like a picture into `part`."""
    staged, skipped = [], []
    for number, entry in enumerate(entries(source, limits)):
        path = part / f"staged-{number}"
        try:
            if entry.content is None:
                raise PictureError(entry.reason, entry.detail)
            _copy(entry.content, path, folder, limits.most_file_bytes)
            staged.append(_Staged(entry.name, path))
        except PictureError as error:
            skipped.append(_skipped(entry.name, error))
    return staged, skipped


def _copy(content: Content, path: Path, folder: Path, most_bytes: int) -> None:
    """Writes the content if it begins like a picture; PictureError, and no file, when it is of no use."""
    try:
        chunk = content.read(CHUNK)
        _check_start(chunk)
        left = most_bytes
        with _writing(folder), path.open("wb") as file:
            while chunk:
                left -= len(chunk)
                if left < 0:
                    raise PictureError(TOO_LARGE_A_FILE, f"over {most_bytes:,} bytes")
                file.write(chunk)
                chunk = content.read(CHUNK)
    except UnreadableError as error:
        path.unlink(missing_ok=True)
        raise PictureError(UNREADABLE, str(error)) from error
    except PictureError:
        path.unlink(missing_ok=True)
        raise


def _check_start(start: bytes) -> None:
    if not start:
        raise PictureError(EMPTY)
    if kind_of(start) is None:
        nested = start.startswith(ARCHIVE_STARTS) or start[TAR_MARK] == b"ustar"
        raise PictureError(NESTED if nested else NO_PICTURE)


def _choose(staged: list[_Staged], skipped: list[Skipped], limits: Limits) -> list[_Staged]:
    """The usable ones in order of their names, each picture once; the rest is added to `skipped` and removed."""
    chosen: list[_Staged] = []
    names: dict[bytes, str] = {}  # of the pictures chosen, by their pixels
    # Sorting is stable: files of one name stay in the archive's order.
    staged = sorted(staged, key=lambda one: one.name)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            digests = pool.map(lambda one: _look_at(one.path, limits), staged)
            for done, (one, looked_at) in enumerate(zip(staged, digests, strict=True)):
                if done and done % LOG_EVERY == 0:
                    log.info("%d of %d files looked at", done, len(staged))
                error = looked_at if isinstance(looked_at, PictureError) else None
                if error is None and looked_at in names:
                    error = PictureError(DUPLICATE, f"of {names[looked_at]}")
                if error is None:
                    names[looked_at] = shown(one.name)
                    chosen.append(one)
                else:
                    skipped.append(_skipped(one.name, error))
                    one.path.unlink()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # or Ctrl-C would wait for all of them
    return chosen


def _look_at(path: Path, limits: Limits) -> bytes | PictureError:
    """A digest of the pixels that training sees: the same for copies with other metadata or saved anew losslessly."""
    try:
        picture = load_picture(path, limits.least_side, limits.most_pixels)
    except PictureError as error:
        return error
    width, height = picture.size
    digest = hashlib.sha256(b"%d %d " % picture.size)
    for top in range(0, height, STRIP):
        digest.update(picture.crop((0, top, width, min(top + STRIP, height))).tobytes())
    return digest.digest()


def _check_enough(source: Path, pictures: Pictures, limits: Limits) -> None:
    if len(pictures.paths) >= limits.least_pictures:
        return
    if not pictures.paths and not pictures.skipped:
        raise ArchiveError(f"{source}: holds no files; {WANTED}, at least {limits.least_pictures}")
    if any(skipped.reason == ENCRYPTED for skipped in pictures.skipped):
        raise ArchiveError(f"{source}: is encrypted ({pictures.summary()}); make it again without a password")
    raise ArchiveError(f"{source}: holds {pictures.summary()}; at least {limits.least_pictures} pictures are wanted")


def _publish(chosen: list[_Staged], skipped: list[Skipped], part: Path, folder: Path) -> Pictures:
    """Gives the files their names and the folder its own."""
    names = []
    for number, one in enumerate(chosen, 1):
        with one.path.open("rb") as file:
            kind = kind_of(file.read(CHUNK))
        names.append(f"{number:06d}.{kind.lower()}")
        os.rename(one.path, part / names[-1])
    pictures = Pictures([folder / name for name in names], skipped)
    pictures.write_index(part)
    os.replace(part, folder)
    return pictures


def _skipped(name: str, error: PictureError) -> Skipped:
    return Skipped(shown(name), error.reason, shown(error.detail))
