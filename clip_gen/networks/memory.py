"""Embeddings of training pictures, from which those near a text's are taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import BridgeConfig

NEAREST, SOFTNESS = (
    16,
    0.05,
)  # a picture is drawn from so many; a cosine that is lower by SOFTNESS makes it e times rarer
CHUNK = 2000  # embeddings that are compared with all others at once


class Memory(nn.Module):
    """Remembers embeddings as bytes along their principal axes.

    Many pictures fit a text, and its embedding lies between theirs, where no picture's embedding lies. A transformer
    draws a mixture of these pictures from there. So each candidate takes the embedding of a remembered picture near the
    text, as in kNN-Diffusion, arXiv 2204.02849. Near is by the cosine of the differences from the mean embedding.
    """

    def __init__(self, embed_dim: int, config: BridgeConfig):
        super().__init__()
        axes = min(config.memory_axes, embed_dim)
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("axes", torch.zeros(axes, embed_dim))
        self.register_buffer("steps", torch.ones(axes))  # of a byte
        self.register_buffer("rows", torch.zeros(config.memory, axes, dtype=torch.int8))

    @torch.no_grad()
    def fill(self, embeddings: Tensor) -> None:
        """Remembers those of embeddings (N, E) that differ most from the ones before them.

        ValueError if there are too few.
        """
        count, axes = self.rows.shape
        if len(embeddings) < count:
            raise ValueError(f"{len(embeddings)} embeddings are too few for a memory of {count}; encode more pictures")
        self.mean.copy_(embeddings.mean(dim=0))
        centred = embeddings - self.mean
        self.axes.copy_(torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -axes:].T)
        places = centred @ self.axes.T
        kept = places[nearest_before(places).topk(count, largest=False).indices.sort().values]
        self.steps.copy_(kept.abs().amax(dim=0).clamp(min=1e-6) / 127)
        self.rows.copy_((kept / self.steps).round())

    def near(self, embeddings: Tensor, chances: Tensor) -> Tensor:
        """For each of embeddings (B, E) n remembered ones near it, (B, n, E). chances: (B, n) in [0, 1), which ones."""
        places = self.rows * self.steps
        asked = F.normalize((embeddings - self.mean) @ self.axes.T, dim=1)
        values, nearest = (asked @ F.normalize(places, dim=1).T).topk(min(NEAREST, len(places)))
        shares = (values / SOFTNESS).softmax(dim=1).cumsum(dim=1)
        taken = torch.searchsorted(shares, chances.to(shares).contiguous()).clamp(max=shares.shape[1] - 1)
        # All nearest ones, whatever n: the rounding of a product depends on its size.
        near = F.normalize(places[nearest] @ self.axes + self.mean, dim=2)
        return near.gather(1, taken[..., None].expand(-1, -1, near.shape[2]))


def nearest_before(places: Tensor) -> Tensor:
    """The greatest cosine of each row of (N, K) with an earlier row, (N,); -1 for the first one."""
    directions, nearest = F.normalize(places, dim=1), []
    for start in range(0, len(places), CHUNK):
        chunk = directions[start : start + CHUNK]
        cosines = chunk @ directions[: start + len(chunk)].T
        is_earlier = torch.ones_like(cosines, dtype=torch.bool).tril(start - 1)
        nearest.append(cosines.masked_fill(~is_earlier, -1.0).amax(dim=1))
    return torch.cat(nearest)
