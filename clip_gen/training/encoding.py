"""The transformer's training data, computed once into .npy files: embeddings, tokens and similar pictures.

All processes of a training share this work: each encodes parts of the pictures.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from clip_gen.files import atomic_file, write_text_atomic
from clip_gen.hardware import is_out_of_memory, on_device
from clip_gen.images import from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training import processes
from clip_gen.training.datasets import (
    EncodedPictures,
    PictureFiles,
    Views,
    enough_places,
    loader_with_workers,
    open_rows,
)
from clip_gen.training.plan import TrainSettings
from clip_gen.training.processes import wait_for
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

BATCH_SIZE = 32
LOG_SECONDS = 30
ENCODING_TIME = 0.05  # of max_minutes
POOL_SIZE, MAX_NEIGHBOURS = 2048, 64
PART_ROWS = 4096  # pictures that a lost process has encoded in vain at most
CUT = "-cut.npy"
EMBEDDINGS, TOKENS, NEIGHBOURS = "embeddings-learnt.json", "tokens-learnt.json", "neighbours-learnt.npy"

Part = Callable[[], Iterable[Tensor]]  # batches (B, S, S, 3) uint8


def encode_train_pictures(
    files: PictureFiles,
    networks: Networks,
    folder: Path,
    settings: TrainSettings,
    streamed: Sequence[Part] = (),
    view_count: int = 1,
    streamed_count: int = 0,
) -> EncodedPictures:
    """Views of every picture, as many as there is time for, with neighbours if the settings need them.

    streamed: parts that take the place of the files, with one view of each of about streamed_count pictures.
    """
    views = Views(files, view_count, settings.seed) if view_count > 1 else files
    seconds, neighbours = _seconds(settings.max_minutes), None
    embeddings, tokens = encode_in_parts(
        streamed or parts_of(views), streamed_count or len(views), networks, folder, seconds, gaps=bool(streamed)
    )
    pictures = 0 if streamed else len(files)
    if settings.contrast_weight or settings.condition_blur:
        neighbours = find_neighbours(embeddings, pictures, folder / NEIGHBOURS, settings.seed)
    encoded = EncodedPictures(
        embeddings,
        tokens,
        pictures,
        noise=settings.embedding_noise,
        dropout=settings.condition_dropout,
        neighbours=neighbours,
        blur=settings.condition_blur,
        # The embedding loss needs whole pictures.
        places=0 if settings.embedding_loss_weight else enough_places(open_rows(tokens)),
    )
    if len(encoded) < len(files) and not rank_zero_only.rank:
        log.warning(few_pictures(len(encoded), len(files)))
    return encoded


def encode_held_back(files: PictureFiles, networks: Networks, folder: Path, max_minutes: float) -> EncodedPictures:
    embeddings, tokens = folder / "embeddings-held_back.npy", folder / "tokens-held_back.npy"
    encode_once(files, {embeddings: networks.clip, tokens: networks.vqgan}, _seconds(max_minutes))
    return EncodedPictures(embeddings, tokens)


def _seconds(max_minutes: float) -> float:
    return 60 * ENCODING_TIME * max_minutes or inf


def few_pictures(encoded: int, wanted: int) -> str:
    return (
        f"gpt: its time sufficed to encode {encoded:,} of {wanted:,} pictures, and it learns from no others; give "
        f"{wanted / encoded:.1f} times as many max_minutes"
    )


@torch.no_grad()
def encode_once(pictures: Dataset, networks: Mapping[Path, ClipEncoder | VQGAN], seconds: float = inf) -> None:
    """Writes a row for each of the pictures (S, S, 3) uint8 to each file, unless it exists.

    A ClipEncoder gives embeddings (N, E) float16, a VQGAN tokens (N, T) uint16 or uint32. Stops after `seconds` with
    the pictures encoded by then, at least one batch. The first process writes the files. ValueError when out of memory.
    """
    if rank_zero_only.rank:
        for path in networks:
            wait_for(path)
    missing = {path: network for path, network in networks.items() if not path.is_file()}
    if not missing:
        return
    progress = _Progress(", ".join(path.name for path in missing), len(pictures), seconds)
    with _ready(*missing.values()) as device:
        batches = progress.within_time(loader_with_workers(pictures, batch_size=BATCH_SIZE))
        rows = _encode_all(batches, list(missing.values()), device)
    for path, array in zip(missing, rows, strict=True):
        save_array(path, array)


def parts_of(pictures: Dataset) -> list[Part]:
    """The pictures (S, S, 3) uint8 in parts of equal size, of which there are at least 16 if they are many."""
    count, batches = len(pictures), -(-len(pictures) // BATCH_SIZE)
    size = min(PART_ROWS, BATCH_SIZE * -(-batches // 16))
    sharing = min(processes.count(), torch.cuda.device_count() or 1)  # by the processes on this machine

    def part(first: int) -> Iterable[Tensor]:
        rows = Subset(pictures, range(first, min(first + size, count)))
        return loader_with_workers(rows, sharing, batch_size=BATCH_SIZE)

    return [partial(part, first) for first in range(0, count, size)]


@torch.no_grad()
def encode_in_parts(
    parts: Sequence[Part], pictures: int, networks: Networks, folder: Path, seconds: float = inf, gaps: bool = False
) -> tuple[Path, Path]:
    """Encodes the training pictures as float16 embeddings and as tokens; returns the lists of their files.

    Each of `parts` gives batches (B, S, S, 3) uint8, and is encoded by one of the processes of this training. A part
    whose process was lost is encoded by another one, or when the training resumes. pictures: in all parts, for the log.
    Stops after `seconds`, at least with one batch. The lists are JSON, in the order of the parts; without `gaps` they
    end at the first part that is missing. ValueError when out of memory.
    """
    lists = folder / EMBEDDINGS, folder / TOKENS
    if not lists[-1].is_file():
        paths = [folder / "parts" / f"tokens-{number:06d}.npy" for number in range(len(parts))]
        progress = _Progress("encoding", pictures, seconds, processes.count())
        processes.use_own_gpu()
        with _ready(networks.clip, networks.vqgan) as device:
            for path in processes.divided(paths):
                batches = progress.within_time(parts[paths.index(path)]())
                rows = _encode_all(batches, [networks.clip, networks.vqgan], device)
                for name, array in zip(_names(path, is_cut=progress.was_cut), rows, strict=True):
                    save_array(path.with_name(name), array)
                if progress.is_over():
                    break
        if not rank_zero_only.rank:
            processes.wait_until_free(paths)
            _write_lists(paths, lists, gaps)
    wait_for(lists[-1])
    return lists


def remove_incomplete_parts(folder: Path) -> None:
    """Forgets that the encoding has ended if a time limit ended it, so that the missing parts are encoded."""
    lists = [folder / EMBEDDINGS, folder / TOKENS]
    if all(path.is_file() and json.loads(path.read_text())["is_complete"] for path in lists):
        return
    earlier_versions = folder.glob("*-learnt.npy")
    for path in (*lists, folder / NEIGHBOURS, *earlier_versions, *folder.glob(f"parts/*{CUT}")):
        path.unlink(missing_ok=True)


def _names(tokens: Path, is_cut: bool) -> tuple[str, str]:
    """The names of a part's files of embeddings and of tokens; other ones if a time limit cut it short."""
    name = tokens.stem + CUT if is_cut else tokens.name
    return name.replace("tokens", "embeddings"), name


def _write_lists(paths: Sequence[Path], lists: tuple[Path, Path], gaps: bool) -> None:
    found: list[tuple[str, str]] = []
    for path in paths:
        names = _names(path, is_cut=not path.exists())
        if path.with_name(names[1]).exists():
            found.append(names)
        if not (path.exists() or gaps):
            break
    is_complete = all(path.exists() for path in paths)
    found = [names for names in found if len(np.load(paths[0].with_name(names[1]), mmap_mode="r"))]
    for path, names in zip(lists, zip(*found, strict=True), strict=True):
        files = [f"parts/{name}" for name in names]
        write_text_atomic(path, json.dumps({"is_complete": is_complete, "files": files}))


@contextmanager
def _ready(*networks: nn.Module) -> Iterator[torch.device]:
    """The device that these networks are on meanwhile."""
    # Not compiled: a resumed training, which has compiled nothing, must get the same tokens.
    with on_device(*networks) as device, torch.compiler.set_stance("force_eager"):
        yield device


def _encode_all(
    batches: Iterable[Tensor], networks: Sequence[ClipEncoder | VQGAN], device: torch.device
) -> list[np.ndarray]:
    """The rows of each network."""
    rows: list[list[np.ndarray]] = [[np.empty((0, _width(network)), _dtype(network))] for network in networks]
    for batch in batches:
        images = from_bytes(batch.to(device))
        for part, network in zip(rows, networks, strict=True):
            part.append(_encode(network, images))
    return [np.concatenate(part) for part in rows]


def _width(network: ClipEncoder | VQGAN) -> int:
    return network.config.embed_dim if isinstance(network, ClipEncoder) else network.config.grid**2


def _dtype(network: ClipEncoder | VQGAN) -> type:
    if isinstance(network, ClipEncoder):
        return np.float16
    return np.uint16 if network.config.codebook_size <= 2**16 else np.uint32


def _encode(network: ClipEncoder | VQGAN, images: Tensor) -> np.ndarray:
    try:
        rows = network.encode_image(images) if isinstance(network, ClipEncoder) else network.encode(images)
        return rows.cpu().numpy().astype(_dtype(network))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory while encoding {len(images)} pictures; train with a smaller resolution"
        raise ValueError(message) from error


class _Progress:
    """Ends batches when `seconds` have passed since the first, and logs how many pictures the time allows.

    sharing: processes that encode the same pictures at the same speed.
    """

    def __init__(self, name: str, count: int, seconds: float, sharing: int = 1):
        self.name, self.count, self.seconds, self.sharing = name, count, seconds, sharing
        self.began, self.logged, self.done, self.was_cut = time.monotonic(), -inf, 0, False

    def is_over(self) -> bool:
        return time.monotonic() - self.began >= self.seconds

    def within_time(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches, at least one of them; was_cut tells whether others were left."""
        for number, batch in enumerate(batches):
            self.was_cut = number > 0 and self.is_over()
            if self.was_cut:
                return
            yield batch
            self.done += len(batch)
            self._log()

    def _log(self) -> None:
        passed, done = time.monotonic() - self.began, min(self.count, self.done * self.sharing)
        is_last = done >= self.count or passed >= self.seconds
        if rank_zero_only.rank or not (is_last or passed - self.logged >= LOG_SECONDS):
            return
        self.logged, reach = passed, min(self.count, max(done, done * self.seconds / passed))
        limit = f"; about {reach:,.0f} fit into {self.seconds / 60:.2g} minutes" if reach < self.count else ""
        message = "%s: %s of %s views, %.0f a second%s"
        log.info(message, self.name, f"{done:,}", f"{self.count:,}", done / passed, limit)


def save_array(path: Path, rows: np.ndarray) -> None:
    """Writes a .npy completely or not at all. OSError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, durable=False) as temporary, open(temporary, "wb") as file:
        if rows.nbytes:
            os.posix_fallocate(file.fileno(), 0, rows.nbytes)  # numpy's own error for a full disk has no errno
        np.save(file, rows)


def find_neighbours(embeddings: Path, pictures: int, path: Path, seed: int) -> Path:
    """Writes the nearest rows of each row, nearest first, as a .npy of (N, K) int32, unless the file exists.

    Nearest is by cosine, among the rows of one random pool: comparing all rows would take quadratic time. Row r is a
    view of picture r % pictures (0: each row is a picture), and views of the same picture are no neighbours. Rows with
    fewer than K neighbours are filled up with themselves.
    """
    if rank_zero_only.rank:
        wait_for(path)
    if path.is_file():
        return path
    rows = open_rows(embeddings)
    order = np.random.default_rng(seed).permutation(len(rows))
    pools = np.array_split(order, -(-len(rows) // POOL_SIZE))
    neighbours = np.empty((len(rows), min(MAX_NEIGHBOURS, min(map(len, pools)))), np.int32)
    for pool in pools:
        directions = F.normalize(torch.from_numpy(rows[pool].astype(np.float32)), dim=1)
        picture = torch.from_numpy(pool % (pictures or len(rows)))
        similarity = (directions @ directions.T).masked_fill(picture[:, None] == picture, -2.0)
        values, nearest = similarity.topk(neighbours.shape[1], dim=1)
        neighbours[pool] = np.where(values > -2.0, pool[nearest.numpy()], pool[:, None])
    save_array(path, neighbours)
    return path
