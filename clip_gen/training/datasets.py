"""What the stages learn from: pictures read from disk, and pictures encoded once into arrays.

Sample number n of a training is the same picture with the same chance in it whatever came before, on how many machines
and after how many restarts: everything random about it is drawn from (seed, n).
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing.util
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil, inf, isqrt
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_gen.data.decoding import load_picture
from clip_gen.hardware import on_device, release_memory, spare_cores
from clip_gen.images import from_bytes
from clip_gen.networks.bridge import add_noise
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.processes import wait_for
from clip_gen.training.shared_memory import SHARED_MEMORY, workers_that_fit

log = logging.getLogger(__name__)

ORDER, CHANCE = range(2)  # what a sample's number is turned into by chance: which picture, and how it is shown
POOL, NEAREST = 2048, 64  # among so many embeddings, so many of the nearest are looked for
LIKEST = 16  # of them, one of which is a near miss
MIDDLE = (1.0, 0.5, 0.5)  # the whole shorter side, as far from either end of the longer one
LOOKED_AT = 2000  # pictures, for how many places of their tokens tell something
ROUNDING = 1e-3  # between a picture's embeddings, as float16, of two networks that were compiled differently
REDUCING_GAP = 3.0  # times the wanted size that a picture is reduced to first, which is fast; the rest is bicubic
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal for this process when its parent ends
PLAIN = 12  # levels of 255 by which a plain ground may vary, as JPEG makes it


class Batches(Sampler[list[int]]):
    """The sample numbers of each batch from batch `first` on: batch b holds b·B to (b + 1)·B - 1, shared out by rank.

    Says it is as long as the whole, since Lightning counts in what a stage did before.
    """

    def __init__(self, count: int, batch_size: int, first: int = 0, rank: int = 0, ranks: int = 1):
        if batch_size % ranks:
            raise ValueError(f"batch_size is {batch_size}; {ranks} processes share it, so give a multiple of {ranks}")
        self.count, self.batch_size, self.first, self.rank, self.ranks = count, batch_size, first, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.first, self.count):
            yield list(range(batch * self.batch_size + self.rank, (batch + 1) * self.batch_size, self.ranks))

    def __len__(self) -> int:
        return self.count


Drawn = TypeVar("Drawn", covariant=True)


class Drawable(Protocol[Drawn]):
    """So many pictures, each of which can be shown in ways that chance decides."""

    def __len__(self) -> int: ...

    def draw(self, index: int, rng: np.random.Generator) -> Drawn: ...


class Endless(Dataset):
    """Sample number n of a set gone through again and again, in another order each time."""

    def __init__(self, pictures: Drawable, seed: int):
        self.pictures, self.seed = pictures, seed
        self.round, self.order = -1, np.empty(0, int)

    def __getitem__(self, number: int) -> object:
        turn, place = divmod(number, len(self.pictures))
        if turn != self.round:
            self.round = turn
            self.order = np.random.default_rng([self.seed, ORDER, turn]).permutation(len(self.pictures))
        return self.pictures.draw(int(self.order[place]), np.random.default_rng([self.seed, CHANCE, number]))


class PictureFiles(Dataset):
    """Pictures on disk as (S, S, 3) uint8: item i is the middle square; `draw` crops, shifts and flips by chance.

    crop: the least share of the shorter side that a crop keeps, 1 for none. shift: move what stands on a plain ground.
    """

    def __init__(
        self, paths: Sequence[Path], resolution: int, crop: float = 0.8, flip: bool = True, shift: bool = False
    ):
        self.paths, self.resolution, self.crop, self.flip, self.shift = paths, resolution, crop, flip, shift

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._square(self._load(index), *MIDDLE)

    def draw(self, index: int, rng: np.random.Generator) -> np.ndarray:
        # Every number is drawn whatever the settings, so that switching one leaves the others as they were.
        share, x, y, mirrored = rng.uniform(self.crop, 1), rng.random(), rng.random(), rng.random() < 0.5
        down, right = rng.random(2)
        square = (share, x, y) if self.crop < 1 else MIDDLE
        pixels = self._square(self._load(index), *square)
        pixels = shifted(pixels, down, right) if self.shift else pixels
        return np.ascontiguousarray(pixels[:, ::-1]) if self.flip and mirrored else pixels

    def _load(self, index: int) -> Image.Image:
        # Large JPEGs are decoded at the smallest scale that _square reduces to by itself.
        return load_picture(self.paths[index], ceil(REDUCING_GAP * self.resolution / self.crop))

    def _square(self, picture: Image.Image, share: float, x: float, y: float) -> np.ndarray:
        """A square of this share of the shorter side, at x and y in [0, 1] of the room there is, at S x S."""
        side = max(1, round(min(picture.size) * share))
        left, top = round((picture.width - side) * x), round((picture.height - side) * y)
        box = (left, top, left + side, top + side)
        if side == self.resolution:
            return np.array(picture.crop(box))
        size = (self.resolution, self.resolution)
        # Lanczos overshoots at hard edges; reducing first is several times faster on photographs.
        return np.array(picture.resize(size, Image.Resampling.BICUBIC, box, REDUCING_GAP))


def shifted(pixels: np.ndarray, down: float, right: float) -> np.ndarray:
    """(S, S, 3) uint8 with what stands on a ground of one colour moved to `down` and `right` in [0, 1] of where it can
    stand whole and as far from the edges as it was, or a 32nd of the side. Where the ground is not plain all along two
    opposite edges, nothing moves between them.
    """
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    stands = (np.abs(pixels - ground) > PLAIN).any(axis=2)
    moves = []
    for lines, place in ((stands.any(axis=1), down), (stands.any(axis=0), right)):
        there = np.flatnonzero(lines)
        before, after = (there[0], len(lines) - 1 - there[-1]) if len(there) else (0, 0)
        edge = min(before, after, max(1, len(lines) // 32))
        moves.append(round((before + after - 2 * edge) * place) - (before - edge) if edge else 0)
    return np.roll(pixels, moves, axis=(0, 1))


class Views(Dataset):
    """Each picture `count` times over, as chance shows it: item v · n + i is view v of picture i of n."""

    def __init__(self, pictures: Drawable, count: int, seed: int):
        self.pictures, self.count, self.seed = pictures, count, seed

    def __len__(self) -> int:
        return len(self.pictures) * self.count

    def __getitem__(self, row: int) -> object:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.pictures.draw(row % len(self.pictures), np.random.default_rng([self.seed, CHANCE, row]))


def prepared(samples: Dataset, sharing: int = 1, **options: object) -> DataLoader:
    """Batches from as many processes as there are cores to spare and shared memory for; `sharing` processes of this
    machine do the same. They are forked from this one, which gives back what it has freed first: with KEEP_MEMORY each
    would hold a copy of it.
    """
    wanted = max(1, spare_cores() // sharing)
    workers = workers_that_fit(DataLoader(samples, **options), wanted, sharing)
    release_memory()
    if workers:
        make_socket_folder()
    return Loader(samples, num_workers=workers, worker_init_fn=_leave_signals, **options)


def make_socket_folder() -> None:
    """The folder for the sockets through which workers hand over batches, shared by all workers and removed when this
    process ends. It is in shared memory because an address has at most 107 bytes: where TMPDIR has some 75, no worker
    could send a batch, and the training would wait for ever.
    """
    before, tempfile.tempdir = tempfile.tempdir, SHARED_MEMORY
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before


class Loader(DataLoader):
    """Its workers get no signal before they are ready for it."""

    def __iter__(self) -> Iterator:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals(worker: int) -> None:
    """A worker ends when its parent does. Signals that a terminal or `timeout` sends to both are for the parent, which
    may need the worker's batch to reach a checkpoint; SIGTERM from the parent itself still ends the worker.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


Encoded = tuple[Tensor, Tensor, bool, Tensor, Tensor] | tuple[Tensor, Tensor, bool, Tensor, Tensor, Tensor, Tensor]


class EncodedPictures(Dataset):
    """Of each picture: condition (E,) float32, tokens (T,) int64, whether to draw it without one, embedding (E,), near
    miss (E,).

    The rows are views of so many `pictures`, in Views' order; 0: each is a picture of its own. Item i is picture i as
    it is, its embedding the condition. `draw` takes one of its views, pushes the condition by up to `noise` in a random
    direction, and drops it at the chance `dropout`. A near miss is the embedding of another picture that is much like
    it, pushed as the condition is: that of `near_misses`, or one of its neighbours; where there are none it is the
    condition itself. At the chance `blur` the condition is the mean of the embedding and some of its neighbours', which
    is where the embedding of a text lies that fits them all. With `places` a picture drawn comes with so many places of
    its tokens to learn from, (K,) int64, and the chance that each had, (K,) float32; see drawn_places.
    """

    def __init__(
        self,
        embeddings: Path,
        tokens: Path,
        pictures: int = 0,
        *,
        noise: float = 0.0,
        dropout: float = 0.0,
        near_misses: Path | None = None,
        neighbours: Path | None = None,
        blur: float = 0.0,
        places: int = 0,
    ):
        self.embeddings, self.tokens, self.near_misses, self.neighbours = (
            path and np.load(path, mmap_mode="r") for path in (embeddings, tokens, near_misses, neighbours)
        )
        self.rows = min(len(self.embeddings), len(self.tokens))
        self.pictures = min(pictures or self.rows, self.rows)
        self.noise, self.dropout, self.blur, self.places = noise, dropout, blur, places

    def __len__(self) -> int:
        return self.pictures

    def __getitem__(self, index: int) -> Encoded:
        embedding, tokens = self._row(index)
        return embedding, tokens, False, embedding, embedding

    def draw(self, index: int, rng: np.random.Generator) -> Encoded:
        row = int(rng.choice(np.arange(index, self.rows, self.pictures)))
        embedding, tokens = self._row(row)
        # Each picture at a strength of its own, so that clean and far-off embeddings are both at home.
        strength = self.noise * rng.random()
        seed = int(rng.integers(2**62))

        def pushed(clean: Tensor) -> Tensor:
            return add_noise(clean[None], strength, torch.Generator().manual_seed(seed))[0]

        condition = near_miss = embedding
        if self.near_misses is not None:
            near_miss = self._embedding(self.near_misses[row])
            if torch.allclose(near_miss, embedding, rtol=0, atol=ROUNDING):
                near_miss = embedding  # the same picture, encoded at another time
        elif self.neighbours is not None:
            near_miss = self._embedding(self.embeddings[rng.choice(self.neighbours[row, :LIKEST])])
        if rng.random() < self.blur:
            # As often few as many: the more of them, the less they have in common.
            some = self.neighbours[row, : int(self.neighbours.shape[1] ** rng.random())]
            others = self._embedding(self.embeddings[some])
            condition = near_miss = F.normalize(embedding + others.sum(dim=0), dim=0)
        drawn = pushed(condition), tokens, bool(rng.random() < self.dropout), embedding, pushed(near_miss)
        return (
            (*drawn, *map(torch.from_numpy, drawn_places(tokens.numpy(), self.places, rng))) if self.places else drawn
        )

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        return self._embedding(self.embeddings[row]), torch.from_numpy(self.tokens[row].astype(np.int64))

    def _embedding(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.astype(np.float32))


def telling(tokens: np.ndarray) -> np.ndarray:
    """(N, T) bool: whether a token (N, T) is another than the one to its left or the one above. The others, plain
    ground, are most of a drawing and teach little.
    """
    side = isqrt(tokens.shape[1])
    grid = tokens.reshape(-1, side, side)
    tells = np.zeros(grid.shape, bool)
    tells[:, :, 1:] |= grid[:, :, 1:] != grid[:, :, :-1]
    tells[:, 1:] |= grid[:, 1:] != grid[:, :-1]
    tells[:, 0, 0] = True
    return tells.reshape(tokens.shape)


def enough_places(tokens: np.ndarray) -> int:
    """How many places of tokens (N, T) to learn from at a time: about those that tell something and an eighth of all;
    0 for all, where leaving some out would save little.
    """
    count = -(-(telling(tokens[:LOOKED_AT]).sum(axis=1).mean() + tokens.shape[1] / 8) // 16) * 16
    return int(count) if count <= 0.75 * tokens.shape[1] else 0


def drawn_places(tokens: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the places of tokens (T,) in order, int64, and the chance that each had to be among them, float32.

    The first always is. Then come those that tell something, and by chance as many others as there is room for; others
    are a sixth at least, for which some that tell give way where a picture has many.
    """
    tells = telling(tokens[None])[0]
    edges, plain = np.flatnonzero(tells[1:]) + 1, np.flatnonzero(~tells)
    of_plain = min(len(plain), max(count - 1 - len(edges), count // 6))
    of_edges = count - 1 - of_plain
    places = np.concatenate([[0], rng.permutation(edges)[:of_edges], rng.permutation(plain)[:of_plain]])
    chances = [1.0, of_edges / max(1, len(edges)), of_plain / max(1, len(plain))]
    order = places.argsort()
    return places[order], np.repeat(chances, [1, of_edges, of_plain])[order].astype(np.float32)


def find_neighbours(embeddings: Path, pictures: int, path: Path, seed: int) -> Path:
    """Which rows are most like each, the likest first, as a .npy of (N, NEAREST) int32, unless it is there already.

    Like is by cosine, and looked for in a random pool that both are in: the time would grow as the square of the
    pictures. Views of one of the `pictures` (0: every row is one) are no neighbours; where there are too few others, a
    row stands in for them itself.
    """
    if rank_zero_only.rank:
        wait_for(path)
    if path.is_file():
        return path
    rows = np.load(embeddings, mmap_mode="r")
    order = np.random.default_rng(seed).permutation(len(rows))
    pools = np.array_split(order, -(-len(rows) // POOL))
    count = min(NEAREST, min(map(len, pools)))
    with whole_array(path, (len(rows), count), np.int32) as found:
        for pool in pools:
            directions = F.normalize(torch.from_numpy(rows[pool].astype(np.float32)), dim=1)
            shown = torch.from_numpy(pool % (pictures or len(rows)))
            likeness = (directions @ directions.T).masked_fill(shown[:, None] == shown, -2.0)
            values, nearest = likeness.topk(count, dim=1)
            found[pool] = np.where(values > -2.0, pool[nearest.numpy()], pool[:, None])
    return path


def token_type(codebook_size: int) -> type[np.integer]:
    """The smallest type that holds every token of the codebook; ValueError for a codebook that none holds."""
    for dtype in (np.uint16, np.int32):
        if codebook_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise ValueError(f"the codebook has {codebook_size} codes; at most {np.iinfo(np.int32).max + 1} can be stored")


def encode_tokens(pictures: Dataset, vqgan: VQGAN, path: Path, seconds: float = inf) -> Path:
    """The tokens of pictures (S, S, 3) uint8 as a .npy of (N, T) in token_type, unless it is there already.

    After so many seconds it holds those there was time for, and at least a first batch.
    """
    dtype = token_type(vqgan.config.codebook_size)
    return _encoded_once(pictures, vqgan, vqgan.encode, path, dtype, vqgan.config.grid**2, seconds)


def encode_embeddings(pictures: Dataset, clip_encoder: ClipEncoder, path: Path, seconds: float = inf) -> Path:
    """Their CLIP embeddings as a .npy of (N, E) float16, as encode_tokens has it."""
    width = clip_encoder.config.embed_dim
    return _encoded_once(pictures, clip_encoder, clip_encoder.encode_image, path, np.float16, width, seconds)


@torch.no_grad()
def _encoded_once(
    pictures: Dataset,
    network: nn.Module,
    encode: Callable[[Tensor], Tensor],
    path: Path,
    dtype: type,
    width: int,
    seconds: float,
    batch_size: int = 64,
) -> Path:
    """A row for each picture, in their order; the file is whole or not there. Of several processes one writes it."""
    if rank_zero_only.rank:
        wait_for(path)
    if path.is_file():
        _check_type(path, dtype)
        return path
    done, progress = 0, _Progress(path.name, len(pictures), seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".rows")  # how many there will be is known at the end
    with unfinished.open("wb") as file, on_device(network) as device:
        for batch in prepared(pictures, batch_size=batch_size):
            rows, batch_size = _encoded(batch, encode, device, batch_size, path.name)
            file.write(rows.numpy().astype(dtype).tobytes())
            done += len(batch)
            if progress.out_of_time(done):
                break
    with whole_array(path, (done, width), dtype) as rows:
        rows[:] = np.memmap(unfinished, dtype, "r", shape=rows.shape)
    unfinished.unlink()
    return path


class _Progress:
    """Logs how far encoding is, and after the first batch how much of it the time suffices for."""

    def __init__(self, name: str, count: int, seconds: float):
        self.name, self.count, self.seconds = name, count, seconds
        self.began, self.said, self.reach = time.perf_counter(), 0.0, None

    def out_of_time(self, done: int) -> bool:
        passed = time.perf_counter() - self.began
        if self.reach is None:
            self.reach = max(done, min(self.count, done * self.seconds / passed))
            if self.reach < self.count:
                words = "%s: about %s of %s views fit into %.2g minutes"
                log.info(words, self.name, f"{self.reach:,.0f}", f"{self.count:,}", max(0, self.seconds) / 60)
        if passed >= self.seconds and done < self.count:
            log.info("%s: there was time for %d of %d views", self.name, done, self.count)
            return True
        if passed - self.said >= 30:
            self.said = passed
            log.info("%s: %d of %d pictures, %.0f a second", self.name, done, self.count, done / passed)
        return False


def _check_type(path: Path, dtype: type) -> None:
    """ValueError for tokens of an earlier version, which stored 16 bits of each whatever the codebook."""
    found = np.load(path, mmap_mode="r").dtype
    if found != dtype:
        raise ValueError(
            f"{path} holds {found} numbers, but this codebook needs {np.dtype(dtype)}; delete {path.parent} and "
            f"{path.parent.parent / 'gpt'} to encode the pictures and train the transformer again"
        )


def _encoded(
    batch: Tensor, encode: Callable[[Tensor], Tensor], device: torch.device, most: int, name: str
) -> tuple[Tensor, int]:
    """A row for each picture of the batch, and how many at a time there was memory for, of `most` at first."""
    while True:
        try:
            return torch.cat([encode(from_bytes(part.to(device))).cpu() for part in batch.split(most)]), most
        except torch.OutOfMemoryError:
            if most == 1:
                raise
        # Out here nothing holds on to what there was no room for.
        torch.cuda.empty_cache()
        most //= 2
        log.warning("%s: out of memory; going on with %d pictures at a time", name, most)


@contextmanager
def whole_array(path: Path, shape: tuple[int, ...], dtype: type) -> Iterator[np.ndarray]:
    """An array on disk to fill in; the .npy is there when all of it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows = np.lib.format.open_memmap(part, "w+", dtype, shape)
    # A mapped file that runs out of disk ends the process by SIGBUS; here it is an OSError.
    with part.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    yield rows
    rows.flush()
    os.replace(part, path)
