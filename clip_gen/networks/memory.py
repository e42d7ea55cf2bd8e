"""Embeddings of training pictures, from which those near a text's are taken."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import BridgeConfig

NEAREST = 16  # a picture is drawn from so many
SOFTNESS = 0.02  # a cosine that is lower by this makes a picture e times rarer
SHOWS_ALL, ALIKE, SLACK = 0.93, 0.9, 1.15  # see Memory
FEW = 0.02  # share of the candidates; fewer are not worth it
RIDGE = 1e-4  # of the regression; a number of an embedding has a variance of about 1e-3
CHUNK = 2000  # embeddings that are compared with all others at once


class Found(NamedTuple):
    """The remembered pictures near each of B texts."""

    near: Tensor  # (B, n, E), their embeddings
    shares: Tensor  # (B, n), how often each is taken; not normalised
    some_fit: Tensor  # (B, 1), True: those with a share above 0 fit the text. False: none fits.


class Memory(nn.Module):
    """Remembers embeddings as bytes along their principal axes.

    Many pictures fit a text, and its embedding lies between theirs, where no picture's embedding lies. A transformer
    draws a mixture of these pictures from there. So each candidate takes the embedding of a remembered picture near the
    text, as in kNN-Diffusion, arXiv 2204.02849. Near is by the cosine of the differences from the mean embedding.

    A text is about the mean of the pictures that fit it. So a fitting picture's difference reaches as far in the
    direction of the text's as that does. And the more a text says, the longer its difference is, and the higher the
    cosine with its pictures. A picture lacks something that the text says if it reaches less than SHOWS_ALL of the way,
    or if the cosine is lower than expected. SLACK is the tolerance of the squared sine, and ALIKE is always enough.

    If all near pictures lack something, as when no picture has this combination, the candidates take the text's
    embedding. They add what these pictures have and texts leave unsaid, such as the style: along a few directions in
    which pictures differ most from their captions.
    """

    def __init__(self, embed_dim: int, config: BridgeConfig):
        super().__init__()
        axes = min(config.memory_axes, embed_dim)
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("axes", torch.zeros(axes, embed_dim))
        self.register_buffer("steps", torch.ones(axes))  # of a byte
        self.register_buffer("rows", torch.zeros(config.memory, axes, dtype=torch.int8))
        self.register_buffer("unsaid_mean", torch.zeros(embed_dim))
        self.register_buffer("unsaid_from", torch.zeros(embed_dim, config.unsaid_axes))
        self.register_buffer("unsaid_axes", torch.zeros(config.unsaid_axes, embed_dim))

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

    @torch.no_grad()
    def learn_unsaid(self, pictures: Tensor, texts: Tensor) -> None:
        """Learns what texts leave unsaid from embeddings (N, E) of pictures and of a caption of each.

        By regression of the difference on the picture, reduced to the directions in which it varies most. Call `fill`
        before.
        """
        centred, differences = pictures - self.mean, pictures - texts
        self.unsaid_mean.copy_(differences.mean(dim=0))
        covariance = centred.T @ centred / len(centred) + RIDGE * torch.eye(len(self.mean))
        weights = torch.linalg.solve(covariance, centred.T @ (differences - self.unsaid_mean) / len(centred))
        told = centred @ weights
        directions = torch.linalg.eigh(told.T @ told).eigenvectors[:, -len(self.unsaid_axes) :]
        self.unsaid_from.copy_(weights @ directions)
        self.unsaid_axes.copy_(directions.T)

    def unsaid(self, pictures: Tensor) -> Tensor:
        """What texts leave unsaid about pictures, as a difference of embeddings: (..., E) to (..., E)."""
        return self.unsaid_mean + (pictures - self.mean) @ self.unsaid_from @ self.unsaid_axes

    def search(self, embeddings: Tensor) -> Found:
        """The remembered pictures nearest to each of embeddings (B, E)."""
        places, asked, cosines = self._compared(embeddings)
        values, nearest = cosines.topk(min(NEAREST, len(places)))
        # All nearest ones, whatever n: the rounding of a product depends on its size.
        near = F.normalize(places[nearest] @ self.axes + self.mean, dim=2)
        length = asked.norm(dim=1, keepdim=True)
        reach = (places[nearest] @ asked[..., None])[..., 0] / length**2
        whole = places.norm(dim=1).quantile(0.25)  # the length for a text that says all about one thing
        least = (1 - SLACK * (1 - (length / whole) ** 2)).clamp(0, ALIKE**2).sqrt()
        shares = (values / SOFTNESS).softmax(dim=1)
        fitting = shares * ((reach >= SHOWS_ALL) & (values >= least))
        some_fit = fitting.sum(dim=1, keepdim=True) > FEW
        return Found(near, torch.where(some_fit, fitting, shares), some_fit)

    def nearest_cosine(self, embeddings: Tensor) -> Tensor:
        """The cosine of each of embeddings (B, E) with the nearest remembered one, less the mean of both, (B,)."""
        return self._compared(embeddings)[2].amax(dim=1)

    def _compared(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The remembered ones and embeddings (B, E) along the axes, (M, K) and (B, K), and their cosines, (B, M)."""
        places = self.rows * self.steps
        asked = (embeddings - self.mean) @ self.axes.T
        return places, asked, F.normalize(asked, dim=1) @ F.normalize(places, dim=1).T

    def near(self, embeddings: Tensor, chances: Tensor) -> Tensor:
        """For each of embeddings (B, E) n embeddings to draw from, (B, n, E). chances: (B, n) in [0, 1), which ones."""
        near, shares, some_fit = self.search(embeddings)
        sums = shares.cumsum(dim=1)
        taken = torch.searchsorted(sums / sums[:, -1:], chances.to(sums).contiguous()).clamp(max=sums.shape[1] - 1)
        moved = F.normalize(embeddings[:, None] + self.unsaid(near), dim=2)
        near = torch.where(some_fit[..., None], near, moved)
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
