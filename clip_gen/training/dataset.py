"""Pictures encoded once: tokens and embeddings in two arrays on disk, read from there ever after."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_gen.clip_encoder import ClipEncoder
from clip_gen.images import from_bytes
from clip_gen.vqgan import VQGAN

log = logging.getLogger(__name__)


class Onward(Sampler[int]):
    """In order from `first` on; says it is as long as the whole, since Lightning counts in what a stage did before."""

    def __init__(self, count: int, first: int):
        self.count, self.first = count, first

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.count))

    def __len__(self) -> int:
        return self.count


class EncodedPictures(Dataset):
    """(embedding (E,) float32, tokens (T,) int64) of each picture."""

    def __init__(self, embeddings: Path, tokens: Path):
        self.embeddings = np.load(embeddings, mmap_mode="r")
        self.tokens = np.load(tokens, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        embedding = torch.from_numpy(self.embeddings[index].astype(np.float32))
        return embedding, torch.from_numpy(self.tokens[index].astype(np.int64))


def encode_tokens(pictures: Dataset, vqgan: VQGAN, path: Path) -> Path:
    """The tokens of pictures (S, S, 3) uint8 as a .npy of (N, T) uint16, unless it is there already."""
    return _encoded_once(pictures, vqgan.encode, path, np.uint16, vqgan.config.grid**2)


def encode_embeddings(pictures: Dataset, clip_encoder: ClipEncoder, path: Path) -> Path:
    """Their CLIP embeddings as a .npy of (N, E) float16, unless it is there already."""
    return _encoded_once(pictures, clip_encoder.encode_image, path, np.float16, clip_encoder.config.embed_dim)


@torch.no_grad()
def _encoded_once(
    pictures: Dataset, encode: Callable[[Tensor], Tensor], path: Path, dtype: type, width: int, batch_size: int = 64
) -> Path:
    """A row for each picture, in their order; the file is whole or not there."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    count, began = len(pictures), time.perf_counter()
    part = path.with_suffix(".part")
    rows = np.lib.format.open_memmap(part, "w+", dtype, (count, width))
    for start, batch in zip(range(0, count, batch_size), DataLoader(pictures, batch_size, num_workers=1), strict=True):
        rows[start : start + len(batch)] = encode(from_bytes(batch)).numpy()
        if start // batch_size % 100 == 99:
            speed = start / (time.perf_counter() - began)
            log.info("%s: %d of %d pictures, %.0f a second", path.name, start, count, speed)
    rows.flush()
    os.replace(part, path)
    return path
