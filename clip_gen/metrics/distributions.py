"""Distances between the distributions of two sets of pictures, given as features (N, D) and (M, D); 0: the same.

Figures with different features do not compare, nor do FIDs of sets of different sizes: FID is biased upwards by about
1/N, so that a small set looks worse (arXiv 1911.07023). KID has no such bias, and CMMD's is small.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from clip_gen.metrics.intervals import GROUPS, Estimate, leaving_out

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as published
SIGMA, SCALE = 10.0, 1000.0  # of CMMD, as published
BLOCK = 256  # rows of a matrix of kernels that are computed together: 100 MB for 50,000 pictures


class _Features(nn.Identity):
    """Stands where torchmetrics wants a network: the pictures are features already."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_features = dim


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance between Gaussians with the sets' means and covariances, arXiv 1706.08500."""
    metric = FrechetInceptionDistance(_Features(real.shape[1])).set_dtype(torch.float64)
    for features, is_real in ((real, True), (generated, False)):
        for part in features.split(BLOCK):  # of which the copies in double precision are small
            metric.update(part.double(), real=is_real)
    return float(metric.compute())


def kid(real: Tensor, generated: Tensor, seed: int = 0) -> float:
    """Squared maximum mean discrepancy with a cubic kernel, the mean over random subsets, arXiv 1801.01401.

    Unbiased, so that it may be below 0. Usually printed times 1,000.
    """
    size = min(SUBSET_SIZE, len(real), len(generated))
    subsets = 1 if size == len(real) == len(generated) else SUBSETS
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter(
            "ignore"
        )  # that it keeps the features, and that `update`, which copies them, is not called
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=size)
        metric.real_features, metric.fake_features = real, generated
        torch.manual_seed(seed)
        return float(metric.compute()[0])


def cmmd(real: Tensor, generated: Tensor) -> float:
    """Squared maximum mean discrepancy of CLIP embeddings with a Gaussian kernel, times 1,000, arXiv 2401.09603."""
    sums = [_kernel_sum(*pair) for pair in ((real, real), (generated, generated), (real, generated))]
    return _discrepancy(*sums, len(real), len(generated))


def cmmd_with_interval(real: Tensor, generated: Tensor) -> Estimate:
    """CMMD and the interval that intervals.jackknife gives it, from sums of kernels between tenths: computing CMMD
    again without each tenth takes eleven times as long, which is hours for 50,000 pictures.
    """
    if min(len(real), len(generated)) < 2 * GROUPS:
        return Estimate(cmmd(real, generated), math.nan, math.nan)
    tenths = [[part[group::GROUPS] for group in range(GROUPS)] for part in (real, generated)]
    sums = [_kernel_sums(tenths[i], tenths[j]) for i, j in ((0, 0), (1, 1), (0, 1))]
    sizes = [torch.tensor([len(tenth) for tenth in some], dtype=torch.float64) for some in tenths]

    def without(group: int | None) -> float:
        kept = torch.tensor([float(other != group) for other in range(GROUPS)], dtype=torch.float64)
        return _discrepancy(*(float(kept @ part @ kept) for part in sums), *(float(kept @ size) for size in sizes))

    return leaving_out(without(None), [without(group) for group in range(GROUPS)])


def _discrepancy(real: float, generated: float, between: float, real_count: float, generated_count: float) -> float:
    """From the sums of the kernels within both sets and between them."""
    within = real / real_count**2 + generated / generated_count**2
    return SCALE * (within - 2 * between / (real_count * generated_count))


def _kernel_sums(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Between each two parts of two sets, (10, 10) float64."""
    return torch.tensor([[_kernel_sum(one, other) for other in second] for one in first], dtype=torch.float64)


def _kernel_sum(first: Tensor, second: Tensor) -> float:
    """In double precision: the kernels are all close to 1, and what counts are their differences."""
    second = second.double()
    blocks = (torch.cdist(part.double(), second).square() for part in first.split(BLOCK))
    return float(sum(torch.exp(squared / (-2 * SIGMA**2)).sum() for squared in blocks))
