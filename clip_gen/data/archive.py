"""A zip, a tar or a folder of any origin to a folder of usable pictures, each once.

Nothing in an archive decides where a byte is written: files are numbered, their names are kept as text.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from clip_gen.data.colours import TRANSPARENT
from clip_gen.data.decoding import ONE_COLOUR, decode, is_one_colour
from clip_gen.data.entries import (
    ENCRYPTED,
    UNREADABLE,
    WANTED,
    Content,
    Entry,
    UnreadableError,
    entries,
    folder_files,
    is_litter,
    reason_of,
)
from clip_gen.data.file_kinds import HEAD_BYTES, PictureError, kind_of
from clip_gen.data.limits import ArchiveError, Limits
from clip_gen.data.manifest import Pictures, Skipped, shown
from clip_gen.data.tars import CHUNK
from clip_gen.files import sha256_of

log = logging.getLogger(__name__)

LIMITS = Limits()
UNPACKING = ".unpacking-"
LOG_EVERY = 2000  # files
STRIP = 256  # rows of a picture copied at once
THREADS = 2  # each may hold a decoded picture of Limits.max_pixels

DUPLICATE = "a duplicate"
TOO_LARGE_A_FILE = "too large a file"


@dataclass(frozen=True)
class _Staged:
    """A file that is written but not decoded yet, with its name in the archive."""

    name: str
    path: Path


@dataclass(frozen=True)
class _Judged:
    """A picture of use: the digest of the pixels that are trained on, and the notes on it."""

    digest: bytes
    notes: tuple[str, ...]


def unpack(source: Path, folder: Path, limits: Limits = LIMITS) -> Pictures:
    """Copies the usable pictures of a zip, a tar (plain, gz, bz2, xz) or a folder into a new or empty `folder`.

    They are called 000001.jpeg and so on in the order of their original names, so the result depends on the names and
    contents alone. Of pictures with the same pixels the first is used, whatever kind of file they come in. The folder
    is written completely or not at all. ArchiveError when it cannot be, or fewer than limits.min_pictures are of use.
    """
    _check_places(source, folder)
    part = folder.with_name(f"{UNPACKING}{folder.name}")
    try:
        with _writing(folder):
            shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
            part.mkdir(parents=True)
        staged, skipped = _stage(source, part, folder, limits)
        chosen, notes = _choose(staged, skipped, limits)
        skipped.sort(key=lambda one: one.name)
        _check_enough(source, Pictures(chosen, skipped, notes), limits)
        with _writing(folder):
            pictures = _publish(Pictures(chosen, skipped, notes), part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    log.info("%s: %s", source, pictures.summary())
    return pictures


def fingerprint(source: Path) -> str:
    """A digest of an archive's content, or of the names and sizes of a folder's files. "" for what cannot be read:
    `unpack` reports that.
    """
    try:
        if source.is_dir():
            files = ((path.relative_to(source).as_posix(), path) for path in folder_files(source))
            lines = sorted(
                f"{name} {path.stat().st_size}" for name, path in files if not is_litter(name) and path.is_file()
            )
            return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
        if source.is_file():
            return sha256_of(source)
    except OSError:
        pass
    return ""


def check_outside(source: Path, folder: Path) -> None:
    """ArchiveError for a folder inside the one whose pictures it is to hold."""
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ArchiveError(f"{folder}: is inside the folder of pictures {source}; name a folder elsewhere")


def _check_places(source: Path, folder: Path) -> None:
    if not source.exists():
        raise ArchiveError(f"{source}: there is no such file or folder; {WANTED}")
    check_outside(source, folder)
    with _writing(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise ArchiveError(f"{folder}: already exists; name a new or empty folder")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Errors inside concern the disk that is written to, not the archive."""
    try:
        yield
    except OSError as error:
        full = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ArchiveError(f"{folder}: cannot be written to ({reason_of(error)}); {full}name another folder") from error


def _stage(source: Path, part: Path, folder: Path, limits: Limits) -> tuple[list[_Staged], list[Skipped]]:
    """Writes every file that begins like a picture into `part`."""
    staged, skipped = [], []
    for number, entry in enumerate(entries(source, limits)):
        path = part / f"staged-{number}"
        try:
            if entry.content is None:
                raise PictureError(entry.reason, entry.detail)
            _copy(entry, path, folder, limits.max_file_bytes)
            staged.append(_Staged(entry.name, path))
        except PictureError as error:
            skipped.append(_skipped(entry.name, error))
    return staged, skipped


def _copy(entry: Entry, path: Path, folder: Path, max_bytes: int) -> None:
    """Writes the content if it begins like a picture; PictureError, and no file, when it is of no use."""
    try:
        chunk = _start(entry.content)
        kind_of(chunk[:HEAD_BYTES], entry.name)
        left = max_bytes
        with _writing(folder), path.open("wb") as file:
            while chunk:
                left -= len(chunk)
                if left < 0:
                    raise PictureError(TOO_LARGE_A_FILE, f"over {max_bytes:,} bytes")
                file.write(chunk)
                chunk = entry.content.read(CHUNK)
    except UnreadableError as error:
        path.unlink(missing_ok=True)
        raise PictureError(UNREADABLE, str(error)) from error
    except PictureError:
        path.unlink(missing_ok=True)
        raise


def _start(content: Content) -> bytes:
    """The first HEAD_BYTES or more, fewer only where the file ends; a read may return less than asked for."""
    start = b""
    while len(start) < HEAD_BYTES and (chunk := content.read(CHUNK)):
        start += chunk
    return start


def _choose(staged: list[_Staged], skipped: list[Skipped], limits: Limits) -> tuple[list[Path], dict[str, int]]:
    """The usable ones in order of their names, each picture once, and the notes on them; the rest is added to `skipped`
    and removed.
    """
    chosen: list[Path] = []
    notes: Counter[str] = Counter()
    names: dict[bytes, str] = {}  # of the pictures chosen, by their pixels
    # Sorting is stable: files of one name stay in the archive's order.
    staged = sorted(staged, key=lambda one: one.name)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            judgements = pool.map(lambda one: _judge(one.path, limits), staged)
            for done, (one, judged) in enumerate(zip(staged, judgements, strict=True)):
                if done and done % LOG_EVERY == 0:
                    log.info("%d of %d files decoded", done, len(staged))
                if isinstance(judged, _Judged) and judged.digest in names:
                    judged = PictureError(DUPLICATE, f"of {names[judged.digest]}")
                if isinstance(judged, _Judged):
                    names[judged.digest] = shown(one.name)
                    notes.update(judged.notes)
                    chosen.append(one.path)
                else:
                    skipped.append(_skipped(one.name, judged))
                    one.path.unlink()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # or Ctrl-C would wait for all of them
    return chosen, dict(sorted(notes.items()))


def _judge(path: Path, limits: Limits) -> _Judged | PictureError:
    """By the pixels that training sees: copies with other metadata, or saved again without loss, are the same."""
    try:
        decoded = decode(path, limits.min_side, limits.max_aspect, limits.max_pixels)
    except PictureError as error:
        return error
    picture = decoded.image
    if is_one_colour(picture):
        return PictureError(TRANSPARENT if TRANSPARENT in decoded.notes else ONE_COLOUR)
    width, height = picture.size
    digest = hashlib.sha256(b"%d %d " % picture.size)
    for top in range(0, height, STRIP):
        digest.update(picture.crop((0, top, width, min(top + STRIP, height))).tobytes())
    return _Judged(digest.digest(), decoded.notes)


def _check_enough(source: Path, pictures: Pictures, limits: Limits) -> None:
    if len(pictures.paths) >= limits.min_pictures:
        return
    if not pictures.paths and not pictures.skipped:
        raise ArchiveError(f"{source}: holds no files; {WANTED}, at least {limits.min_pictures}")
    if any(skipped.reason == ENCRYPTED for skipped in pictures.skipped):
        raise ArchiveError(f"{source}: is encrypted ({pictures.summary()}); make it again without a password")
    raise ArchiveError(f"{source}: holds {pictures.summary()}; at least {limits.min_pictures} pictures are needed")


def _publish(staged: Pictures, part: Path, folder: Path) -> Pictures:
    """Gives the files and the folder their final names."""
    names = []
    for number, path in enumerate(staged.paths, 1):
        with path.open("rb") as file:
            kind = kind_of(file.read(HEAD_BYTES))
        names.append(f"{number:06d}.{kind.lower()}")
        os.rename(path, part / names[-1])
    pictures = replace(staged, paths=[folder / name for name in names])
    pictures.write_index(part)
    os.replace(part, folder)
    return pictures


def _skipped(name: str, error: PictureError) -> Skipped:
    return Skipped(shown(name), error.reason, shown(error.detail))
