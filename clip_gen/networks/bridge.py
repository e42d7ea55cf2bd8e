"""The gap between text and image embeddings, the method's weak point: noise in training, mean shift in use.

Subtracting each side's mean: "Connect, Collapse, Corrupt", arXiv 2401.08567.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import BridgeConfig


class Bridge(nn.Module):
    """Moves text embeddings towards where image embeddings lie, by the gap between the two means."""

    def __init__(self, embed_dim: int, config: BridgeConfig):
        super().__init__()
        self.config = config
        self.register_buffer("text_mean", torch.zeros(embed_dim))
        self.register_buffer("image_mean", torch.zeros(embed_dim))

    def forward(self, text_embedding: Tensor) -> Tensor:
        """(B, E) unit length to (B, E) unit length."""
        gap = self.image_mean - self.text_mean
        return F.normalize(text_embedding + self.config.mean_shift * gap, dim=-1)


def add_noise(embedding: Tensor, strength: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, E) unit length, pushed in a random direction of length `strength` and brought back to unit length.

    strength: one number, or (B, 1). 0 leaves an embedding as it is; the expected cosine with the clean one is
    1 / sqrt(1 + strength²).
    """
    noise = torch.randn(embedding.shape, generator=generator, device=embedding.device, dtype=embedding.dtype)
    return F.normalize(embedding + strength * F.normalize(noise, dim=-1), dim=-1)
