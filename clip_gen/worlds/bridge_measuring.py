"""Measures what the bridge knows about pictures and texts: their mean embeddings, and the memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.memory import Memory
from clip_gen.training.datasets import loader_with_workers


@torch.no_grad()
def measure_means(bridge: Bridge, clip: ClipEncoder, pictures: Dataset, captions: Sequence[str]) -> float:
    """Sets the bridge's means from pictures (S, S, 3) uint8 and captions of others; returns their distance."""
    loader = loader_with_workers(pictures, batch_size=64)
    with on_device(clip) as device:
        images = torch.cat([clip.encode_image(from_bytes(batch.to(device))) for batch in loader])
        bridge.image_mean.copy_(images.mean(dim=0))
        bridge.text_mean.copy_(clip.encode_text(captions).mean(dim=0))
    return float((bridge.image_mean - bridge.text_mean).norm())


@torch.no_grad()
def fill_memory(memory: Memory, clip: ClipEncoder, embeddings: np.ndarray, captions: Sequence[str]) -> None:
    """embeddings: of pictures, (N, E). captions: of the first pictures; none: what texts leave unsaid stays zero."""
    pictures = torch.tensor(embeddings[:], dtype=torch.float32)
    memory.fill(pictures)
    if captions:
        memory.learn_unsaid(pictures[: len(captions)], clip.encode_text(captions))
