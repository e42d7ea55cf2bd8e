"""WebDataset shards, on the disk or over http, as streams: they are never unpacked.

`gather` keeps small copies of some pictures for stage 1, or of all if they fit. If not, stage 2 is encoded from the
shards themselves, and only the encodings are kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import tarfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPException
from math import ceil
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from clip_gen.data.archive import DUPLICATE, LIMITS, TRANSPARENT
from clip_gen.data.decoding import ONE_COLOUR, decode, is_one_colour
from clip_gen.data.file_kinds import HEAD_BYTES, NO_PICTURE, UnusableError, kind_of
from clip_gen.data.limits import CHUNK, ArchiveError, reason_of
from clip_gen.data.manifest import INDEX, Pictures, Skipped, shown
from clip_gen.data.sources import without_secrets
from clip_gen.files import write_text_atomic
from clip_gen.hardware import spare_cores
from clip_gen.images import REDUCING_GAP
from clip_gen.training.datasets import AUGMENT_STREAM
from clip_gen.training.encoding import BATCH_SIZE
from clip_gen.training.squares import Squares
from clip_gen.weights.url import is_url, open_url

log = logging.getLogger(__name__)

WAITS = (1, 5, 20)  # seconds before a download is tried again
LOG_SECONDS = 30
GATHERING = ".gathering-"
LEAST_KEPT_SIDE = 320  # pixels of the shorter side; random crops of it are at least 256 pixels
JPEG_QUALITY = 95
JPEG_START = b"\xff\xd8\xff"

A, B = TypeVar("A"), TypeVar("B")


def pictures_of(shard: str) -> Iterator[tuple[str, bytes]]:
    """The name and the content of the first picture file of each sample; of its first file if none is a picture.

    A download that breaks off is tried again, from the sample that it had reached. ArchiveError if the shard cannot be
    read.
    """
    done = failures = 0
    while True:
        try:
            for sample in _samples(shard, done):
                yield sample
                done, failures = done + 1, 0
            return
        except (OSError, HTTPException, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
            reason = reason_of(str(error.args[0]).split(" @ ")[0] if error.args else error)
            code = getattr(error, "code", 500)  # of HTTP; below 500 another try does not help
            if not is_url(shard) or code < 500 or failures == len(WAITS):
                raise ArchiveError(
                    f"{without_secrets(shard)}: cannot be read ({f'HTTP {code}' if code < 500 else reason}); make it "
                    "available and give the same command again, or leave it out"
                ) from error
            log.warning("%s: %s; trying again in %d s", without_secrets(shard), reason, WAITS[failures])
            time.sleep(WAITS[failures])
            failures += 1


def _samples(shard: str, first: int) -> Iterator[tuple[str, bytes]]:
    name = PurePosixPath(without_secrets(shard)).name
    with closing(_opened(shard)) as stream:
        samples = group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
        for number, sample in enumerate(samples):
            if number >= first:
                files = {kind: content for kind, content in sample.items() if isinstance(content, bytes)}
                kind = next((kind for kind, content in files.items() if _is_picture(content)), next(iter(files), ""))
                yield f"{name}/{sample['__key__']}.{kind}", files.get(kind, b"")
        while stream.read(CHUNK):
            pass
        if getattr(stream, "length", None):  # bytes that a server has promised and not sent
            raise EOFError("its end is missing")


def _opened(shard: str) -> BinaryIO:
    return open_url(shard, deadline_seconds=float("inf")) if is_url(shard) else open(shard, "rb")


def _is_picture(content: bytes) -> bool:
    try:
        kind_of(content[:HEAD_BYTES])
    except UnusableError:
        return False
    return True


def in_threads(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`function` of each item, in order, computed in a thread for each spare core, a few items ahead."""
    threads = spare_cores()
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@dataclass(frozen=True)
class _Kept:
    """A small copy of a picture: its name in the shard, file name, content, SHA-256 of its pixels, and notes."""

    name: str
    suffix: str
    content: bytes
    sha256: str
    notes: tuple[str, ...]


def gather(shards: Sequence[str], folder: Path, resolution: int, most_bytes: float, seed: int) -> Pictures:
    """Keeps small copies of pictures in a new `folder`, until they have `most_bytes` or all are read; at least 8.

    The shards are read in random order. The shorter side of a copy has 5/4 of the resolution, but at least
    LEAST_KEPT_SIDE; smaller pictures are kept as they are. The folder appears when it is complete; shards that were
    read before an interruption are not read again. ArchiveError if a shard cannot be read, or for too few pictures.
    """
    side, used, records, began = max(LEAST_KEPT_SIDE, ceil(resolution * 5 / 4)), 0, {}, time.monotonic()
    identity = hashlib.sha256(json.dumps([side, *map(without_secrets, shards)]).encode()).hexdigest()
    part = folder.with_name(f"{GATHERING}{identity[:16]}")
    for other in folder.parent.glob(f"{GATHERING}*"):
        if other != part:
            shutil.rmtree(other)
    for number in np.random.default_rng(seed).permutation(len(shards)).tolist():
        place = part / f"{number:06d}"
        if not (place / INDEX).is_file():
            shutil.rmtree(place, ignore_errors=True)
            _gather_shard(shards[number], place, side, most_bytes - used)
        records[number] = json.loads((place / INDEX).read_text())
        used += records[number]["bytes"]
        if time.monotonic() - began >= LOG_SECONDS:
            began = time.monotonic()
            log.info("%d of %d shards read, %.2f GB of pictures kept", len(records), len(shards), used / 1e9)
        if used >= most_bytes:
            break
    is_all = len(records) == len(shards) and all(record["is_whole"] for record in records.values())
    pictures = _joined(records, part, folder, 0 if is_all else len(shards))
    if len(pictures.paths) < LIMITS.min_pictures:
        raise ArchiveError(f"{without_secrets(shards[0])}: its shards hold {pictures.summary()}; at least 8 are needed")
    pictures.write_index(part, folder)
    part.rename(folder)
    rest = f"; a sample of about {pictures.estimated:,} in {len(shards):,} shards" if pictures.estimated else ""
    log.info("%s%s", pictures.summary(), rest)
    return pictures


def _joined(records: dict[int, dict], part: Path, folder: Path, shards: int) -> Pictures:
    """The pictures of all shards that were read, without duplicates. shards: how many there are, if others were not."""
    pictures, names, notes = Pictures([], []), {}, Counter()
    for number, record in sorted(records.items()):
        pictures.skipped.extend(Skipped(**one) for one in record["skipped"])
        for one in record["kept"]:
            if one["sha256"] in names:
                pictures.skipped.append(Skipped(shown(one["name"]), DUPLICATE, f"of {names[one['sha256']]}"))
                (part / f"{number:06d}" / one["file"]).unlink(missing_ok=True)
            else:
                names[one["sha256"]] = shown(one["name"])
                pictures.paths.append(folder / f"{number:06d}" / one["file"])
                pictures.names.append(one["name"])
                notes.update(one["notes"])
    estimated = len(pictures.paths) * shards // max(1, len(records))
    return Pictures(pictures.paths, pictures.skipped, dict(sorted(notes.items())), pictures.names, estimated)


def _gather_shard(shard: str, place: Path, side: int, most_bytes: float) -> None:
    place.mkdir(parents=True)
    kept, skipped, used, is_whole = [], [], 0, True
    results = in_threads(partial(_small_copy, side), pictures_of(shard))
    with closing(results):
        for result in results:
            if isinstance(result, Skipped):
                skipped.append(asdict(result))
                continue
            file = f"{len(kept):06d}.{result.suffix}"
            (place / file).write_bytes(result.content)
            kept.append({"file": file, "name": result.name, "sha256": result.sha256, "notes": result.notes})
            used += len(result.content)
            if used >= most_bytes and len(kept) >= LIMITS.min_pictures:
                is_whole = False  # or nearly so
                break
    record = {"bytes": used, "is_whole": is_whole, "kept": kept, "skipped": skipped}
    write_text_atomic(place / INDEX, json.dumps(record))


def _small_copy(side: int, picture: tuple[str, bytes]) -> _Kept | Skipped:
    name, content = picture
    try:
        kind, image, notes = _decoded(content, side + 1)  # so that a JPEG read at a smaller scale is larger than side
    except UnusableError as error:
        return Skipped(shown(name), error.reason, shown(error.detail))
    if min(image.size) > side:
        scale = side / min(image.size)
        size = tuple(max(1, round(length * scale)) for length in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
        kind = "JPEG" if kind == "JPEG" else "PNG"
        file = io.BytesIO()
        image.save(file, kind, **({"quality": JPEG_QUALITY, "subsampling": 0} if kind == "JPEG" else {}))
        content = file.getvalue()
    sha256 = hashlib.sha256(b"%d %d " % image.size + image.tobytes()).hexdigest()
    return _Kept(name, kind.lower(), content, sha256, notes)


def _decoded(content: bytes, wanted_side: int) -> tuple[str, Image.Image, tuple[str, ...]]:
    """PIL's name of a usable picture's format, the picture, and notes; UnusableError for any other file."""
    if len(content) > LIMITS.max_file_bytes:
        raise UnusableError(NO_PICTURE)
    kind = kind_of(content[:HEAD_BYTES])
    decoded = decode(content, LIMITS.min_side, LIMITS.max_aspect, LIMITS.max_pixels, wanted_side)
    if is_one_colour(decoded.image):
        raise UnusableError(TRANSPARENT if TRANSPARENT in decoded.notes else ONE_COLOUR)
    return kind, decoded.image, decoded.notes


def shard_parts(
    shards: Sequence[str], pictures: Pictures, held_back: Collection[Path], squares: Squares, seed: int
) -> list[Callable[[], Iterator[Tensor]]]:
    """For each shard what gives its usable pictures, in batches (B, S, S, 3) uint8, each drawn once at random.

    Pictures held back are left out. Empty if all pictures of the shards are kept.
    """
    if not pictures.estimated:
        return []
    left_out = frozenset(pictures.names_of(held_back))
    streams = [[seed, AUGMENT_STREAM, number] for number in range(len(shards))]
    return [partial(_batches, shard, squares, left_out, seeds) for shard, seeds in zip(shards, streams, strict=True)]


def _batches(shard: str, squares: Squares, left_out: frozenset[str], seeds: list[int]) -> Iterator[Tensor]:
    def square(numbered: tuple[int, tuple[str, bytes]]) -> np.ndarray | None:
        number, (name, content) = numbered
        if name in left_out:
            return None
        try:
            _, picture, _ = _decoded(content, squares.wanted_side)
        except UnusableError:
            return None
        return squares.draw(picture, np.random.default_rng([*seeds, number]))

    batch: list[np.ndarray] = []
    with closing(in_threads(square, enumerate(pictures_of(shard)))) as drawn:
        for pixels in drawn:
            if pixels is not None:
                batch.append(pixels)
            if len(batch) == BATCH_SIZE:
                yield torch.from_numpy(np.stack(batch))
                batch = []
    if batch:
        yield torch.from_numpy(np.stack(batch))
