"""Unpacks untrusted zips, tars or folders to a folder of usable pictures without duplicates.

Names in the archive never become paths: the pictures are numbered.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clip_gen.data.colours import TRANSPARENT
from clip_gen.data.decoding import ONE_COLOUR, decode, is_one_colour
from clip_gen.data.entries import Entry, entries, folder_files, is_litter
from clip_gen.data.file_kinds import HEAD_BYTES, UnusableError, kind_of
from clip_gen.data.limits import ArchiveError, Limits, reason_of
from clip_gen.data.manifest import Pictures, Skipped, shown
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
    """A copied file that is not decoded yet, with its name in the archive and PIL's name of its format."""

    name: str
    path: Path
    kind: str


def unpack(source: Path | Sequence[Path], folder: Path, limits: Limits = LIMITS, name: str = "") -> Pictures:
    """Copies the usable pictures of a zip, a tar (plain, gz, bz2, xz) or a folder into a new or empty `folder`.

    Several sources are read as one; they may include single pictures. name: how messages call them.

    The files are named 000001.jpeg and so on in the order of their original names, so the result depends on names and
    contents only. Of pictures with equal pixels the first is used, in whatever format. The folder is written completely
    or not at all. ArchiveError if it cannot be written, or if fewer than limits.min_pictures pictures are usable.
    """
    name = name or str(source)
    for one in [source] if isinstance(source, Path) else source:
        check_outside(one, folder)
    part = folder.with_name(f"{UNPACKING}{folder.name}")
    try:
        with _writing(folder):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ArchiveError(f"{folder}: already exists; name a new or empty folder")
            shutil.rmtree(part, ignore_errors=True)  # of a killed process
            part.mkdir(parents=True)
        staged, skipped = _stage(source, part, folder, limits)
        chosen, notes = _choose(staged, skipped, limits)
        paths = [folder / f"{number:06d}.{file.kind.lower()}" for number, file in enumerate(chosen, 1)]
        pictures = Pictures(paths, sorted(skipped, key=lambda file: file.name), notes)
        if len(paths) < limits.min_pictures:
            needed = f"at least {limits.min_pictures} pictures are needed"
            raise ArchiveError(f"{name}: holds {pictures.summary()}; {needed}")
        with _writing(folder):
            for file, path in zip(chosen, paths, strict=True):
                os.rename(file.path, part / path.name)
            pictures.write_index(part, folder)
            os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    log.info("%s: %s", name, pictures.summary())
    return pictures


def fingerprint(source: Path) -> str:
    """SHA-256 of an archive, or of the names and sizes of a folder's files; "" if it cannot be read."""
    try:
        if source.is_file():
            return sha256_of(source)
        files = ((path.relative_to(source).as_posix(), path) for path in folder_files(source))
        lines = sorted(
            f"{name} {path.stat().st_size}" for name, path in files if not is_litter(name) and path.is_file()
        )
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
    except OSError:
        return ""


def check_outside(source: Path, folder: Path) -> None:
    """ArchiveError if the folder is inside the source, so that it would contain its own pictures."""
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ArchiveError(f"{folder}: is inside the folder of pictures {source}; name a folder elsewhere")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """OSErrors inside concern the folder that is written to, not the archive."""
    try:
        yield
    except OSError as error:
        full = "make room, or " if disk_is_full(error) else ""
        raise ArchiveError(f"{folder}: cannot be written to ({reason_of(error)}); {full}name another folder") from error


def _stage(
    source: Path | Sequence[Path], part: Path, folder: Path, limits: Limits
) -> tuple[list[_Staged], list[Skipped]]:
    """Copies all files that begin like a picture into `part`."""
    staged, skipped = [], []
    for number, entry in enumerate(entries(source, limits)):
        path = part / f"staged-{number}"
        try:
            with _writing(folder):
                staged.append(_Staged(entry.name, path, _copy(entry, path, limits.max_file_bytes)))
        except UnusableError as error:
            path.unlink(missing_ok=True)
            skipped.append(_skipped(entry.name, error))
    return staged, skipped


def _copy(entry: Entry, path: Path, max_bytes: int) -> str:
    """Copies a file that begins like a picture, and returns its format; UnusableError for any other file."""
    if entry.error is not None:
        raise entry.error
    head = b""
    while len(head) < HEAD_BYTES and (piece := next(entry.pieces, None)) is not None:
        head += piece
    kind, size = kind_of(head[:HEAD_BYTES], entry.name), 0
    with path.open("wb") as file:
        for piece in itertools.chain([head], entry.pieces):
            size += len(piece)
            if size > max_bytes:
                raise UnusableError(TOO_LARGE_A_FILE, f"over {max_bytes:,} bytes")
            file.write(piece)
    return kind


def _choose(staged: list[_Staged], skipped: list[Skipped], limits: Limits) -> tuple[list[_Staged], dict[str, int]]:
    """The usable pictures in the order of their names, without duplicates, and the notes on them.

    Removes the other files and adds them to `skipped`.
    """
    chosen: list[_Staged] = []
    notes: Counter[str] = Counter()
    names: dict[bytes, str] = {}  # of the chosen pictures, by SHA-256 of their pixels
    staged = sorted(staged, key=lambda file: file.name)  # stable: files of equal name stay in the archive's order
    with ThreadPoolExecutor(THREADS) as pool:
        results = [pool.submit(_decoded, file.path, limits) for file in staged]
        try:
            for done, (file, result) in enumerate(zip(staged, results, strict=True)):
                if done and done % LOG_EVERY == 0:
                    log.info("%d of %d files decoded", done, len(staged))
                try:
                    sha256, file_notes = result.result()
                    if sha256 in names:
                        raise UnusableError(DUPLICATE, f"of {names[sha256]}")
                except UnusableError as error:
                    skipped.append(_skipped(file.name, error))
                    file.path.unlink()
                else:
                    names[sha256] = shown(file.name)
                    notes.update(file_notes)
                    chosen.append(file)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # so that Ctrl-C does not wait for all files
    return chosen, dict(sorted(notes.items()))


def _decoded(path: Path, limits: Limits) -> tuple[bytes, tuple[str, ...]]:
    """SHA-256 of a usable picture's pixels, so that copies with other metadata count as duplicates, and its notes."""
    decoded = decode(path, limits.min_side, limits.max_aspect, limits.max_pixels)
    picture = decoded.image
    if is_one_colour(picture):
        raise UnusableError(TRANSPARENT if TRANSPARENT in decoded.notes else ONE_COLOUR)
    sha256 = hashlib.sha256(b"%d %d " % picture.size)
    for top in range(0, picture.height, STRIP):  # in strips: the bytes of a whole picture would double its memory
        sha256.update(picture.crop((0, top, picture.width, min(top + STRIP, picture.height))).tobytes())
    return sha256.digest(), decoded.notes


def _skipped(name: str, error: UnusableError) -> Skipped:
    return Skipped(shown(name), error.reason, shown(error.detail))
