"""Metrics of nearest neighbours between two sets of pictures, given as features (N, D) and (M, D).

Distances are computed in blocks of rows: the matrix of 50,000 pictures with each other would need 10 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # as published
BLOCK = 1024  # rows of a matrix of distances that are computed together


@dataclass(frozen=True)
class Overlap:
    """How far two sets of pictures overlap in the feature space.

    The ball around a picture reaches to its k-th nearest neighbour in its own set.

    precise: for each generated picture, whether it is in a ball of a real one (precision, arXiv 1904.06991).
    recalled: for each real picture, whether it is in a ball of a generated one (recall).
    density: for each generated picture, the number of such balls over k; 1 on average if the sets are alike, and more
    where generated pictures crowd (arXiv 2002.09797). covered: for each real picture, whether its ball holds a
    generated one (coverage).
    """

    precise: Tensor  # (M,) bool
    recalled: Tensor  # (N,) bool
    density: Tensor  # (M,) float32
    covered: Tensor  # (N,) bool


def overlap(real: Tensor, generated: Tensor) -> Overlap:
    """ValueError if a set has fewer pictures than the metrics need."""
    fewest = min(len(real), len(generated))
    if fewest <= DENSITY_NEIGHBOURS:
        raise ValueError(f"a set has {fewest} pictures; precision, recall and coverage need {DENSITY_NEIGHBOURS + 1}")
    large = radii(real, (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS))
    own = radii(generated, (PRECISION_NEIGHBOURS,))[0]
    precise, density = [], []
    nearest = torch.full((len(real),), torch.inf)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for part, radius in zip(generated.split(BLOCK), own.split(BLOCK), strict=True):
        distances = torch.cdist(part, real)
        precise.append((distances <= large[0]).any(dim=1))
        density.append((distances <= large[1]).sum(dim=1) / DENSITY_NEIGHBOURS)
        recalled |= (distances <= radius[:, None]).any(dim=0)
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    return Overlap(torch.cat(precise), recalled, torch.cat(density), nearest <= large[1])


def radii(features: Tensor, neighbours: tuple[int, ...]) -> list[Tensor]:
    """For each k the distance (N,) of each of the features (N, D) to its k-th nearest neighbour among them."""
    found = []
    for start in range(0, len(features), BLOCK):
        distances = torch.cdist(features[start : start + BLOCK], features)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = torch.inf  # itself
        found.append(distances.topk(max(neighbours), largest=False).values)
    sorted_distances = torch.cat(found)
    return [sorted_distances[:, k - 1] for k in neighbours]


def nearest(features: Tensor, others: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Distances and indices, both (N, count), of the nearest of `others` (M, D) to each of the features (N, D)."""
    parts = [torch.cdist(part, others).topk(count, largest=False) for part in features.split(BLOCK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def is_close(distances: Tensor, training: Tensor) -> Tensor:
    """Whether each of the distances (M,) to a nearest training picture is below the median distance of the training
    pictures (N, D) to each other's nearest, (M,) bool. Half are if a generator draws new pictures of the same kind; all
    if it copies.
    """
    return distances < radii(training, (1,))[0].median()
