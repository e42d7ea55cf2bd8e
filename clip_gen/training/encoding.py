"""Encodes images once: CLIP embeddings and VQGAN tokens of a whole dataset, as .npy files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import Dataset

from clip_gen.hardware import is_out_of_memory, on_device
from clip_gen.images import from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.loading import loader_with_workers
from clip_gen.training.processes import wait_for

log = logging.getLogger(__name__)

LOG_SECONDS = 30


def token_type(codebook_size: int) -> type[np.integer]:
    """The smallest integer type for the tokens of a codebook; ValueError for codebooks of more than 2**31 codes."""
    for dtype in (np.uint16, np.int32):
        if codebook_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise ValueError(f"the codebook has {codebook_size} codes; at most {np.iinfo(np.int32).max + 1} can be stored")


def encode_tokens(pictures: Dataset, vqgan: VQGAN, path: Path, seconds: float = inf) -> Path:
    """Writes the tokens of pictures (S, S, 3) uint8 as a .npy of (N, T) in token_type, unless the file exists.

    Stops after `seconds` with the pictures encoded by then, at least one batch.
    """
    dtype = token_type(vqgan.config.codebook_size)
    return _encode_once(pictures, vqgan, vqgan.encode, path, dtype, vqgan.config.grid**2, seconds)


def encode_embeddings(pictures: Dataset, clip_encoder: ClipEncoder, path: Path, seconds: float = inf) -> Path:
    """Writes their CLIP embeddings as a .npy of (N, E) float16; otherwise like encode_tokens."""
    width = clip_encoder.config.embed_dim
    return _encode_once(pictures, clip_encoder, clip_encoder.encode_image, path, np.float16, width, seconds)


@torch.no_grad()
def _encode_once(
    pictures: Dataset,
    network: nn.Module,
    encode: Callable[[Tensor], Tensor],
    path: Path,
    dtype: type,
    width: int,
    seconds: float,
    batch_size: int = 64,
) -> Path:
    """Writes a row for each picture, in order. The file is complete or missing; the first process writes it."""
    if rank_zero_only.rank:
        wait_for(path)
    if path.is_file():
        _check_type(path, dtype)
        return path
    done, progress = 0, _Progress(path.name, len(pictures), seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".rows")  # a .npy starts with its shape, which is known only at the end
    with unfinished.open("wb") as file, on_device(network) as device:
        for batch in loader_with_workers(pictures, batch_size=batch_size):
            rows, batch_size = _encode_batch(batch, encode, device, batch_size, path.name)
            file.write(rows.numpy().astype(dtype).tobytes())
            done += len(batch)
            if progress.out_of_time(done):
                break
    with new_array(path, (done, width), dtype) as rows:
        rows[:] = np.memmap(unfinished, dtype, "r", shape=rows.shape)
    unfinished.unlink()
    return path


class _Progress:
    """Logs the progress of encoding, and after the first batch how many pictures the time allows."""

    def __init__(self, name: str, count: int, seconds: float):
        self.name, self.count, self.seconds = name, count, seconds
        self.began, self.logged, self.reach = time.perf_counter(), 0.0, None

    def out_of_time(self, done: int) -> bool:
        passed = time.perf_counter() - self.began
        if self.reach is None:
            self.reach = max(done, min(self.count, done * self.seconds / passed))
            if self.reach < self.count:
                message = "%s: about %s of %s views fit into %.2g minutes"
                log.info(message, self.name, f"{self.reach:,.0f}", f"{self.count:,}", max(0, self.seconds) / 60)
        if passed >= self.seconds and done < self.count:
            log.info("%s: there was time for %d of %d views", self.name, done, self.count)
            return True
        if passed - self.logged >= LOG_SECONDS:
            self.logged = passed
            log.info("%s: %d of %d pictures, %.0f a second", self.name, done, self.count, done / passed)
        return False


def _check_type(path: Path, dtype: type) -> None:
    """ValueError for tokens of an earlier version, which stored 16 bits of each for any codebook."""
    stored = np.load(path, mmap_mode="r").dtype
    if stored != dtype:
        raise ValueError(
            f"{path} holds {stored} numbers, but this codebook needs {np.dtype(dtype)}; delete {path.parent} and "
            f"{path.parent.parent / 'gpt'} to encode the pictures and train the transformer again"
        )


def _encode_batch(
    batch: Tensor, encode: Callable[[Tensor], Tensor], device: torch.device, size: int, name: str
) -> tuple[Tensor, int]:
    """The rows of the batch, and the number of pictures that fitted into memory at a time, at most `size`."""
    while True:
        try:
            return torch.cat([encode(from_bytes(part.to(device))).cpu() for part in batch.split(size)]), size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise ValueError(f"{name}: out of memory with one picture; train with a smaller resolution") from error
        # Outside the except block, which would keep the tensors of the failed attempt alive.
        torch.cuda.empty_cache()
        size //= 2
        log.warning("%s: out of memory; continuing with %d pictures at a time", name, size)


@contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: type) -> Iterator[np.ndarray]:
    """A memory-mapped array to fill in; `path` exists once it is complete. OSError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows = np.lib.format.open_memmap(part, "w+", dtype, shape)
    # Reserves the space: a full disk would otherwise end the process with SIGBUS when a page is written.
    with part.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    yield rows
    rows.flush()
    os.replace(part, path)
