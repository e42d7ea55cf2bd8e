"""The gap between text and image embeddings: noise in training, a mean shift and a memory in prediction.

The mean shift: "Connect, Collapse, Corrupt", arXiv 2401.08567.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import BridgeConfig
from clip_gen.networks.memory import Memory


class Bridge(nn.Module):
    """Shifts text embeddings by the difference of the mean image and the mean text embedding.

    With a memory, candidates are drawn from embeddings of pictures near them.
    """

    def __init__(self, embed_dim: int, config: BridgeConfig):
        super().__init__()
        self.config = config
        self.register_buffer("text_mean", torch.zeros(embed_dim))
        self.register_buffer("image_mean", torch.zeros(embed_dim))
        self.memory = Memory(embed_dim, config) if config.memory else None

    def without_memory(self) -> Bridge:
        """Drops what belongs to the pictures that a base was trained on, in place: memory, completions, ranking."""
        self.memory, self.config = None, replace(self.config, memory=0, completions=(), likelihood_weight=0.0)
        return self

    def forward(self, text_embedding: Tensor) -> Tensor:
        """(B, E) unit length to (B, E) unit length."""
        gap = self.image_mean - self.text_mean
        return F.normalize(text_embedding + self.config.mean_shift * gap, dim=-1)

    def fits(self, embedding: Tensor) -> bool:
        """Whether pictures in the memory fit a text's embedding, (1, E), shifted."""
        return self.memory is not None and bool(self.memory.search(embedding).some_fit)

    def conditions(self, embeddings: Tensor, chances: Tensor) -> Tensor:
        """What n candidates of each text are drawn from, (B · n, E). embeddings: (B, E), shifted. chances: (B, n)."""
        if self.memory is None:
            return embeddings.repeat_interleave(chances.shape[1], dim=0)
        return self.memory.near(embeddings, chances).flatten(0, 1)


def add_noise(embedding: Tensor, strength: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Adds a random vector of length `strength` to embeddings (B, E) of unit length, and normalizes.

    strength: one number, or (B, 1). The expected cosine with the original embedding is 1 / sqrt(1 + strength²).
    """
    noise = torch.randn(embedding.shape, generator=generator, device=embedding.device, dtype=embedding.dtype)
    return F.normalize(embedding + strength * F.normalize(noise, dim=-1), dim=-1)
