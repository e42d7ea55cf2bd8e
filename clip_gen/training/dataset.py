"""Pictures encoded once: tokens and embeddings in two arrays on disk, read from there ever after."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_gen.clip_encoder import ClipEncoder
from clip_gen.images import from_bytes
from clip_gen.vqgan import VQGAN

log = logging.getLogger(__name__)


class EncodedPictures(Dataset):
    """(embedding (E,) float32, tokens (T,) int64) of each picture."""

    def __init__(self, folder: Path):
        self.embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        embedding = torch.from_numpy(self.embeddings[index].astype(np.float32))
        return embedding, torch.from_numpy(self.tokens[index].astype(np.int64))


@torch.no_grad()
def encode_pictures(
    pictures: Dataset, clip_encoder: ClipEncoder, vqgan: VQGAN, folder: Path, batch_size: int = 64
) -> EncodedPictures:
    """Writes embeddings.npy and tokens.npy for pictures (S, S, 3) uint8, in their order; once, whole or not at all."""
    if not (folder / "tokens.npy").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        count, began = len(pictures), time.perf_counter()
        shapes = {
            "embeddings": (np.float16, clip_encoder.config.embed_dim),
            "tokens": (np.uint16, vqgan.config.grid**2),
        }
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.part", "w+", dtype, (count, width))
            for name, (dtype, width) in shapes.items()
        }
        loader = DataLoader(pictures, batch_size, num_workers=1)
        for start, batch in zip(range(0, count, batch_size), loader, strict=True):
            images = from_bytes(batch)
            arrays["tokens"][start : start + len(batch)] = vqgan.encode(images).numpy()
            arrays["embeddings"][start : start + len(batch)] = clip_encoder.encode_image(images).numpy()
            if start // batch_size % 100 == 99:
                speed = start / (time.perf_counter() - began)
                log.info("encoded %d of %d pictures, %.0f a second", start, count, speed)
        for name in ("embeddings", "tokens"):  # tokens last: they say that both are whole
            arrays[name].flush()
            os.replace(folder / f"{name}.part", folder / f"{name}.npy")
    return EncodedPictures(folder)
