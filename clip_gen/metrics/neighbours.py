"""Metrics of nearest neighbours between two sets of pictures, given as features (N, D) and (M, D).

Distances are computed in blocks of rows: the matrix of 50,000 pictures with each other would need 10 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clip_gen.metrics.intervals import GROUPS, Estimate, leaving_out

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # as published
BLOCK = 1024  # rows of a matrix of distances that are computed together
COLUMNS = 4096  # of them at a time, because torch.cdist copies both sides
SAME = 5e-3  # of the mean distance from the mean features; pictures closer to each other than that are copies


@dataclass(frozen=True)
class Overlap:
    """How far two sets of pictures overlap in the feature space.

    The ball around a picture reaches to its k-th nearest neighbour in its own set.

    precision: the share of generated pictures in a ball of a real one (arXiv 1904.06991). recall: the share of real
    pictures in a ball of a generated one. density: the number of real balls that a generated picture is in, over k; 1
    on average if the sets are alike, and more where generated pictures crowd (arXiv 2002.09797). coverage: the share of
    real pictures whose ball holds a generated one.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def overlap(real: Tensor, generated: Tensor) -> Overlap:
    """With jackknife intervals: pictures share neighbours, so they are no independent samples. The intervals are NaN
    below 20 pictures. ValueError if a set has fewer than the metrics need.
    """
    fewest = min(len(real), len(generated))
    if fewest <= DENSITY_NEIGHBOURS:
        raise ValueError(f"a set has {fewest} pictures; precision, recall and coverage need {DENSITY_NEIGHBOURS + 1}")
    kept_real, kept = _kept(len(real), fewest), _kept(len(generated), fewest)
    small, large = _radii_of_kept(real, (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS), kept_real)
    [own] = _radii_of_kept(generated, (PRECISION_NEIGHBOURS,), kept)
    precise, inside = torch.zeros(len(kept)), torch.zeros(len(kept))
    recalled, nearest_generated = torch.zeros_like(kept_real), torch.full(kept_real.shape, torch.inf)
    for rows in torch.arange(len(generated)).split(BLOCK):
        distances = _distances(generated[rows], real)
        for i, mine in enumerate(kept[:, rows]):
            near = distances[mine]
            precise[i] += (near <= small[i]).any(dim=1).sum()
            inside[i] += (near <= large[i]).sum() / DENSITY_NEIGHBOURS
            recalled[i] |= (near <= own[i, rows][mine, None]).any(dim=0)
            nearest_generated[i] = torch.minimum(nearest_generated[i], near.amin(dim=0))
    covered, count, real_count = nearest_generated <= large, kept.sum(dim=1), kept_real.sum(dim=1)
    recall, coverage = ((part & kept_real).sum(dim=1) / real_count for part in (recalled, covered))
    return Overlap(*map(_estimate, (precise / count, recall, inside / count, coverage), (1.0, 1.0, torch.inf, 1.0)))


def _kept(count: int, fewest: int) -> Tensor:
    """Which pictures are kept: all of them, then those without each tenth, (11, count) bool; (1, count) if few."""
    groups = GROUPS if fewest >= 2 * GROUPS else 0
    return torch.stack([torch.arange(count) % GROUPS != group for group in (-1, *range(groups))])


def _estimate(values: Tensor, most: float) -> Estimate:
    """Of the value of all pictures and those without each tenth, (11,) or (1,). Its interval is within 0 and `most`."""
    value, *others = values.tolist()
    if not others:
        return Estimate(value, torch.nan, torch.nan)
    found = leaving_out(value, others)
    return Estimate(value, max(0.0, found.low), min(most, found.high))


def _radii_of_kept(features: Tensor, neighbours: tuple[int, ...], kept: Tensor) -> list[Tensor]:
    """For each k the radii of the balls of the features (N, D) if only some are kept, (11, N); -1: not kept."""
    found = [torch.full(kept.shape, -1.0) for _ in neighbours]
    for rows in torch.arange(len(features)).split(BLOCK):
        distances = _distances_to_others(features, rows)
        for i, mine in enumerate(kept):
            smallest = distances[:, mine].topk(max(neighbours), largest=False).values
            for radii_of_k, k in zip(found, neighbours, strict=True):
                radii_of_k[i, rows] = torch.where(mine[rows], smallest[:, k - 1], -1.0)
    return found


def _distances_to_others(features: Tensor, rows: Tensor) -> Tensor:
    """Of some of the features (N, D) to all of them, (R, N); infinite to itself."""
    distances = _distances(features[rows], features)
    distances[torch.arange(len(rows)), rows] = torch.inf
    return distances


def _distances(features: Tensor, others: Tensor) -> Tensor:
    """Between features (R, D) and others (N, D), (R, N). Without their mean, small ones are rounded less."""
    mean, found = others.mean(dim=0), features.new_empty(len(features), len(others))
    for columns in torch.arange(len(others)).split(COLUMNS):
        found[:, columns] = torch.cdist(features - mean, others[columns] - mean)
    return found


def nearest(features: Tensor, others: Tensor, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance and index of the nearest of `others` (M, D) to each of the features (N, D), both (N,).

    left_out: for each of the features the index of one that does not count, (N,).
    """
    distances, indices = torch.empty(len(features)), torch.empty(len(features), dtype=torch.long)
    for rows in torch.arange(len(features)).split(BLOCK):
        block = _distances(features[rows], others)
        if left_out is not None:
            block[torch.arange(len(rows)), left_out[rows]] = torch.inf
        distances[rows], indices[rows] = block.min(dim=1)
    return distances, indices


def usual_distance(training: Tensor) -> float:
    """The median distance of the training pictures (N, D) to each other's nearest; copies of each other do not count.

    Half of a generator's pictures are closer to a training picture if it draws new ones of the same kind.
    """
    mean = training.mean(dim=0)
    same = SAME * torch.cat([(part - mean).norm(dim=1) for part in training.split(BLOCK)]).mean()
    found = []
    for rows in torch.arange(len(training)).split(BLOCK):
        distances = _distances(training[rows], training)
        found.append(distances.masked_fill(distances <= same, torch.inf).amin(dim=1))
    different = torch.cat(found)
    different = different[different.isfinite()]
    return float(different.median()) if len(different) else 0.0


def is_close(distances: Tensor, training: Tensor) -> Tensor:
    """Whether each of the distances (M,) to a nearest training picture is at most the usual distance, (M,) bool: for
    half of them if a generator draws new pictures of the same kind, for all if it copies.
    """
    return distances <= usual_distance(training)
