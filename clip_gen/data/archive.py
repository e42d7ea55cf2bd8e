"""Unpacks an untrusted zip, tar or folder to a folder of usable pictures without duplicates.

Names in the archive never become paths: the pictures are numbered.
"""

from __future__ import annotations

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
from clip_gen.files import disk_is_full, sha256_of

log = logging.getLogger(__name__)

LIMITS = Limits()
UNPACKING = ".unpacking-"
LOG_EVERY = 2000  # files
STRIP = 256  # rows of a picture that are hashed at a time
THREADS = 2  # each holds a decoded picture of up to Limits.max_pixels

DUPLICATE = "a duplicate"
TOO_LARGE_A_FILE = "too large a file"


@dataclass(frozen=True)
class _Staged:
    """A copied file that is not decoded yet, with its name in the archive."""

    name: str
    path: Path


@dataclass(frozen=True)
class _Usable:
    """A usable picture: SHA-256 of its pixels, and notes on how it was converted."""

    sha256: bytes
    notes: tuple[str, ...]


def unpack(source: Path, folder: Path, limits: Limits = LIMITS) -> Pictures:
    """Copies the usable pictures of a zip, a tar (plain, gz, bz2, xz) or a folder into a new or empty `folder`.

    The files are named 000001.jpeg and so on in the order of their original names, so the result depends on names and
    contents only. Of pictures with equal pixels the first is used, in whatever format. The folder is written completely
    or not at all. ArchiveError if it cannot be written, or if fewer than limits.min_pictures pictures are usable.
    """
    _check_places(source, folder)
    part = folder.with_name(f"{UNPACKING}{folder.name}")
    try:
        with _writing(folder):
            shutil.rmtree(part, ignore_errors=True)  # of a killed process
            part.mkdir(parents=True)
        staged, skipped = _stage(source, part, folder, limits)
        chosen, notes = _choose(staged, skipped, limits)
        skipped.sort(key=lambda file: file.name)
        _check_enough(source, Pictures(chosen, skipped, notes), limits)
        with _writing(folder):
            pictures = _publish(Pictures(chosen, skipped, notes), part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    log.info("%s: %s", source, pictures.summary())
    return pictures


def fingerprint(source: Path) -> str:
    """SHA-256 of an archive, or of the names and sizes of a folder's files; "" if it cannot be read."""
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
    """ArchiveError if the folder is inside the source, so that it would contain its own pictures."""
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
    """OSErrors inside concern the folder that is written to, not the archive."""
    try:
        yield
    except OSError as error:
        full = "make room, or " if disk_is_full(error) else ""
        raise ArchiveError(f"{folder}: cannot be written to ({reason_of(error)}); {full}name another folder") from error


def _stage(source: Path, part: Path, folder: Path, limits: Limits) -> tuple[list[_Staged], list[Skipped]]:
    """Copies all files that begin like a picture into `part`."""
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
    """Copies the content if it begins like a picture; PictureError, and no file, otherwise."""
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
    """At least the first HEAD_BYTES, or the whole file. A read may return less than was asked for."""
    start = b""
    while len(start) < HEAD_BYTES and (chunk := content.read(CHUNK)):
        start += chunk
    return start


def _choose(staged: list[_Staged], skipped: list[Skipped], limits: Limits) -> tuple[list[Path], dict[str, int]]:
    """The usable pictures in the order of their names, without duplicates, and the notes on them.

    Removes the other files and adds them to `skipped`.
    """
    chosen: list[Path] = []
    notes: Counter[str] = Counter()
    names: dict[bytes, str] = {}  # of the chosen pictures, by SHA-256 of their pixels
    staged = sorted(staged, key=lambda file: file.name)  # stable: files of equal name stay in the archive's order
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            results = pool.map(lambda file: _decoded(file.path, limits), staged)
            for done, (file, result) in enumerate(zip(staged, results, strict=True)):
                if done and done % LOG_EVERY == 0:
                    log.info("%d of %d files decoded", done, len(staged))
                if isinstance(result, _Usable) and result.sha256 in names:
                    result = PictureError(DUPLICATE, f"of {names[result.sha256]}")
                if isinstance(result, _Usable):
                    names[result.sha256] = shown(file.name)
                    notes.update(result.notes)
                    chosen.append(file.path)
                else:
                    skipped.append(_skipped(file.name, result))
                    file.path.unlink()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # so that Ctrl-C does not wait for all files
    return chosen, dict(sorted(notes.items()))


def _decoded(path: Path, limits: Limits) -> _Usable | PictureError:
    """Decodes a picture and hashes its pixels, so that copies with other metadata count as duplicates."""
    try:
        decoded = decode(path, limits.min_side, limits.max_aspect, limits.max_pixels)
    except PictureError as error:
        return error
    picture = decoded.image
    if is_one_colour(picture):
        return PictureError(TRANSPARENT if TRANSPARENT in decoded.notes else ONE_COLOUR)
    width, height = picture.size
    sha256 = hashlib.sha256(b"%d %d " % picture.size)
    for top in range(0, height, STRIP):
        sha256.update(picture.crop((0, top, width, min(top + STRIP, height))).tobytes())
    return _Usable(sha256.digest(), decoded.notes)


def _check_enough(source: Path, pictures: Pictures, limits: Limits) -> None:
    if len(pictures.paths) >= limits.min_pictures:
        return
    if not pictures.paths and not pictures.skipped:
        raise ArchiveError(f"{source}: holds no files; {WANTED}, at least {limits.min_pictures}")
    if any(skipped.reason == ENCRYPTED for skipped in pictures.skipped):
        raise ArchiveError(f"{source}: is encrypted ({pictures.summary()}); make it again without a password")
    raise ArchiveError(f"{source}: holds {pictures.summary()}; at least {limits.min_pictures} pictures are needed")


def _publish(staged: Pictures, part: Path, folder: Path) -> Pictures:
    """Renames the files and the folder to their final names."""
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
