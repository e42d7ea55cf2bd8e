"""What the stages train on: images read from disk, and images encoded once into arrays; loaders of batches.

Sample number n of a training is always the same image with the same random crop, flip and noise, on any number of
machines and after any number of restarts: all its randomness is drawn from (seed, n).
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_gen.data.decoding import load_picture
from clip_gen.hardware import end_with_parent, release_memory, spare_cores
from clip_gen.networks.bridge import add_noise
from clip_gen.training.squares import Squares

MAX_HELD_BACK = 512  # pictures
ORDER_STREAM, AUGMENT_STREAM = range(2)  # random streams of a sample: which picture, and its crop, flip and noise
NEAR_MISS_NEIGHBOURS = 16  # a near miss is one of so many nearest neighbours
MAX_SAMPLED = 2000  # images that enough_places looks at


def split_pictures(paths: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """The paths held back for validation, a twentieth but at least 2 and at most MAX_HELD_BACK, and the others."""
    count = min(MAX_HELD_BACK, max(2, len(paths) // 20))
    shuffled = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
    return shuffled[:count], shuffled[count:]


class Batches(Sampler[list[int]]):
    """The sample numbers of each batch from batch `first` on: batch b has b·B to (b + 1)·B - 1, split between ranks.

    Its length includes the batches before `first`: Lightning counts them too.
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


class Endless(Dataset):
    """An endless dataset: sample n is the nth of pass after pass over the pictures, each in a new random order."""

    def __init__(self, pictures: PictureFiles | EncodedPictures, seed: int):
        self.pictures, self.seed = pictures, seed
        self.epoch, self.order = -1, np.empty(0, int)

    def __getitem__(self, number: int) -> object:
        epoch, index = divmod(number, len(self.pictures))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(len(self.pictures))
        return self.pictures.draw(int(self.order[index]), np.random.default_rng([self.seed, AUGMENT_STREAM, number]))


class PictureFiles(Dataset):
    """Pictures on disk as (S, S, 3) uint8, by Squares(resolution, crop, ...): item i is centred, `draw` is random."""

    def __init__(self, paths: Sequence[Path], resolution: int, *how: object, **named: object):
        self.paths, self.squares = paths, Squares(resolution, *how, **named)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.squares.centre(self._picture(index))

    def draw(self, index: int, rng: np.random.Generator) -> np.ndarray:
        return self.squares.draw(self._picture(index), rng)

    def _picture(self, index: int) -> Image.Image:
        return load_picture(self.paths[index], self.squares.wanted_side)


class Views(Dataset):
    """Each picture in `count` random variants: item v · n + i is view v of picture i of n."""

    def __init__(self, pictures: PictureFiles, count: int, seed: int):
        self.pictures, self.count, self.seed = pictures, count, seed

    def __len__(self) -> int:
        return len(self.pictures) * self.count

    def __getitem__(self, row: int) -> object:
        return self.pictures.draw(row % len(self.pictures), np.random.default_rng([self.seed, AUGMENT_STREAM, row]))


class JoinedRows:
    """Arrays of equal rows, one after the other, whose rows are read by number, slice or numbers as from one array."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        numbers = np.array(range(len(self))[rows]) if isinstance(rows, slice) else np.asarray(rows)
        # A row's number minus the end of its array is negative, and counts from that end.
        of_array = np.searchsorted(self.ends, numbers, side="right")
        if numbers.ndim == 0:
            return self.arrays[of_array][numbers - self.ends[of_array]]
        result = np.empty((len(numbers), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        for number in np.unique(of_array):
            chosen = of_array == number
            result[chosen] = self.arrays[number][numbers[chosen] - self.ends[number]]
        return result


def open_rows(path: Path) -> np.ndarray | JoinedRows:
    """The rows of a .npy, or of the .npy files that a .json lists; they stay on the disk."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    return JoinedRows([np.load(path.parent / name, mmap_mode="r") for name in json.loads(path.read_text())["files"]])


class EncodedPictures(Dataset):
    """Condition (E,) float32, tokens (T,) int64, whether to drop the condition, embedding (E,) and near miss (E,).

    The rows of the arrays are views of `pictures` pictures, in Views' order (0: each row is a picture). Item i is the
    first view of picture i, with its embedding as condition. `draw` takes a random view and changes its condition:

    noise: it is pushed in a random direction, by up to this much. dropout: the probability of training without it.
    blur: the probability that it is the mean of the embedding and some of its neighbours', where the embedding of a
    text that fits all of them lies. places: that many positions to train on, (K,) int64, follow with their
    probabilities, (K,) float32; see drawn_places.

    A near miss is the embedding of a similar picture, pushed like the condition: a row of `near_misses`, or one of the
    `neighbours`; without either it is the condition.
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
            path and open_rows(path) for path in (embeddings, tokens, near_misses, neighbours)
        )
        self.rows = min(len(self.embeddings), len(self.tokens))
        self.pictures = min(pictures or self.rows, self.rows)
        self.noise, self.dropout, self.blur, self.places = noise, dropout, blur, places

    def __len__(self) -> int:
        return self.pictures

    def __getitem__(self, index: int) -> tuple[Tensor | bool, ...]:
        embedding, tokens = self._row(index)
        return embedding, tokens, False, embedding, embedding

    def draw(self, index: int, rng: np.random.Generator) -> tuple[Tensor | bool, ...]:
        row = int(rng.choice(np.arange(index, self.rows, self.pictures)))
        embedding, tokens = self._row(row)
        # A random strength per sample: the transformer sees clean and noisy embeddings.
        strength = self.noise * rng.random()
        seed = int(rng.integers(2**62))

        def pushed(clean: Tensor) -> Tensor:
            return add_noise(clean[None], strength, torch.Generator().manual_seed(seed))[0]

        condition = near_miss = embedding
        if self.near_misses is not None:
            near_miss = self._embedding(self.near_misses[row])
        elif self.neighbours is not None:
            near_miss = self._embedding(self.embeddings[rng.choice(self.neighbours[row, :NEAR_MISS_NEIGHBOURS])])
        if rng.random() < self.blur:
            # Few neighbours as often as many: the more there are, the less they have in common.
            some = self.neighbours[row, : int(self.neighbours.shape[1] ** rng.random())]
            others = self._embedding(self.embeddings[some])
            condition = near_miss = F.normalize(embedding + others.sum(dim=0), dim=0)
        has_near_miss, condition = near_miss is not condition, pushed(condition)
        near_miss = pushed(near_miss) if has_near_miss else condition
        sample = condition, tokens, bool(rng.random() < self.dropout), embedding, near_miss
        if not self.places:
            return sample
        places, probabilities = drawn_places(tokens.numpy(), self.places, rng)
        return *sample, torch.from_numpy(places), torch.from_numpy(probabilities)

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        return self._embedding(self.embeddings[row]), torch.from_numpy(self.tokens[row].astype(np.int64))

    def _embedding(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.astype(np.float32))


def informative(tokens: np.ndarray) -> np.ndarray:
    """(N, T) bool: whether a token (N, T) differs from its left or upper neighbour. The others are plain background,
    which is most of a drawing and teaches little.
    """
    side = isqrt(tokens.shape[1])
    grid = tokens.reshape(-1, side, side)
    differs = np.zeros(grid.shape, bool)
    differs[:, :, 1:] |= grid[:, :, 1:] != grid[:, :, :-1]
    differs[:, 1:] |= grid[:, 1:] != grid[:, :-1]
    differs[:, 0, 0] = True
    return differs.reshape(tokens.shape)


def enough_places(tokens: np.ndarray | JoinedRows) -> int:
    """How many positions of tokens (N, T) to train on at a time: about the informative ones and an eighth of all; 0 for
    all, if leaving some out would save little.
    """
    some = tokens[:MAX_SAMPLED]
    count = -(-(informative(some).sum(axis=1).mean() + some.shape[1] / 8) // 16) * 16
    return int(count) if count <= 0.75 * some.shape[1] else 0


def drawn_places(tokens: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` random positions of tokens (T,), ascending, int64, and the probability that each had, float32.

    The first position is always among them. Informative positions come next, but at least a sixth are others.
    """
    differs = informative(tokens[None])[0]
    edges, plain = np.flatnonzero(differs[1:]) + 1, np.flatnonzero(~differs)
    plain_count = min(len(plain), max(count - 1 - len(edges), count // 6))
    edge_count = count - 1 - plain_count
    places = np.concatenate([[0], rng.permutation(edges)[:edge_count], rng.permutation(plain)[:plain_count]])
    probabilities = [1.0, edge_count / max(1, len(edges)), plain_count / max(1, len(plain))]
    order = places.argsort()
    return places[order], np.repeat(probabilities, [1, edge_count, plain_count])[order].astype(np.float32)


def loader_with_workers(
    samples: Dataset, sharing: int = 1, collate_fn: Callable | None = None, **options: object
) -> DataLoader:
    """A DataLoader with a worker process for each spare core.

    sharing: training processes on this machine that each have such a loader. The workers are forked from this process,
    which returns freed memory to the system first: each would otherwise hold a copy of it.
    """

    def to_arrays(samples_of_batch: list) -> object:
        return tree_map_only(Tensor, Tensor.numpy, (collate_fn or stack)(samples_of_batch))

    release_memory()
    workers = max(1, spare_cores() // sharing)
    return Loader(samples, num_workers=workers, collate_fn=to_arrays, worker_init_fn=_start_worker, **options)


def stack(samples: list) -> object:
    """Joins arrays, or tuples of arrays, to a batch. Torch's default_collate would do it in shared memory."""
    if isinstance(samples[0], tuple):
        return tuple(np.stack(parts) for parts in zip(*samples, strict=True))
    return np.stack(samples)


class Loader(DataLoader):
    """Loads batches of tensors. Its workers send them as arrays, through pipes: tensors would need shared memory, of
    which containers have little, and sockets in TMPDIR.
    """

    def __iter__(self) -> Iterator:
        # Workers inherit the blocked signals: one that a terminal or `timeout` sends to the whole group must not end
        # them, since this process may need their batches to reach a checkpoint.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return (tree_map_only(np.ndarray, torch.from_numpy, batch) for batch in batches)


def _start_worker(worker: int) -> None:
    """Makes a worker end with its parent, and when the parent itself sends SIGTERM."""
    end_with_parent()
    threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
