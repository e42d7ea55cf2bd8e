"""Distances between the distributions of two sets of pictures, given as features (N, D) and (M, D); 0: the same.

Figures with different features do not compare, nor do FIDs of sets of different sizes: FID is biased upwards by about
1/N, so that a small set looks worse (arXiv 1911.07023). So is CMMD, and its bias is known. KID has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from clip_gen.metrics.intervals import GROUPS, Estimate, leaving_out

SIGMA, CMMD_SCALE = 10.0, 1000.0  # of CMMD, as published
KID_SCALE = 1000.0  # as it is usually printed
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


def kid(real: Tensor, generated: Tensor) -> Estimate:
    """Squared maximum mean discrepancy with a cubic kernel, arXiv 1801.01401, times 1,000.

    Unbiased, so that it may be below 0. Papers give the mean over random subsets; this is the value of all pictures,
    which is the expectation of that mean.
    """
    found = _Discrepancy(_cubic_kernel, real, generated)
    return found.estimate(lambda left_out: KID_SCALE * found.unbiased(left_out))


def cmmd(real: Tensor, generated: Tensor) -> tuple[Estimate, float]:
    """Squared maximum mean discrepancy of CLIP embeddings with a Gaussian kernel, times 1,000, arXiv 2401.09603; and
    how much of it is bias, which small sets have.
    """
    found = _Discrepancy(_gaussian_kernel, real, generated)
    bias = found.biased() - found.unbiased() if min(len(real), len(generated)) > 1 else math.nan
    return found.estimate(lambda left_out: CMMD_SCALE * found.biased(left_out)), CMMD_SCALE * bias


def _cubic_kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _gaussian_kernel(first: Tensor, second: Tensor) -> Tensor:
    """In double precision: the kernels are all close to 1, and what counts are their differences."""
    return torch.exp(torch.cdist(first.double(), second.double()).square() / (-2 * SIGMA**2))


class _Discrepancy:
    """Squared maximum mean discrepancy between two sets, of all their pictures or without a tenth of both.

    It keeps the sums of the kernel between tenths. Computing all kernels again without each tenth would take eleven
    times as long, which is hours for 50,000 pictures.
    """

    def __init__(self, kernel: Callable[[Tensor, Tensor], Tensor], real: Tensor, generated: Tensor):
        tenths = [[part[group::GROUPS] for group in range(GROUPS)] for part in (real, generated)]
        self.sizes = [torch.tensor([float(len(tenth)) for tenth in some]) for some in tenths]
        self.within = [_symmetric_sums(kernel, some) for some in tenths]
        self.between = torch.stack([torch.stack([_sum(kernel, a, b) for b in tenths[1]]) for a in tenths[0]])
        self.selves = [torch.stack([_sum_of_selves(kernel, tenth) for tenth in some]) for some in tenths]

    def biased(self, left_out: int | None = None) -> float:
        """With each picture's kernel with itself, as in CMMD."""
        return self._value(left_out, with_selves=True)

    def unbiased(self, left_out: int | None = None) -> float:
        return self._value(left_out, with_selves=False)

    def estimate(self, value: Callable[[int | None], float]) -> Estimate:
        """The value for None, with the jackknife's interval; without one below 20 pictures."""
        if min(float(sizes.sum()) for sizes in self.sizes) < 2 * GROUPS:
            return Estimate(value(None), math.nan, math.nan)
        return leaving_out(value(None), [value(group) for group in range(GROUPS)])

    def _value(self, left_out: int | None, with_selves: bool) -> float:
        kept = torch.tensor([float(group != left_out) for group in range(GROUPS)], dtype=torch.float64)
        counts = [float(sizes.double() @ kept) for sizes in self.sizes]
        value = -2 * float(kept @ self.between @ kept) / (counts[0] * counts[1])
        for count, within, selves in zip(counts, self.within, self.selves, strict=True):
            total = float(kept @ within @ kept)
            value += total / count**2 if with_selves else (total - float(selves @ kept)) / (count * (count - 1))
        return value


def _symmetric_sums(kernel: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Of the kernel between each two of ten parts of a set, (10, 10) float64."""
    sums = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for i in range(len(parts)):
        for j in range(i + 1):
            sums[i, j] = sums[j, i] = _sum(kernel, parts[i], parts[j])
    return sums


def _sum(kernel: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    return sum(kernel(block, second).sum(dtype=torch.float64) for block in first.split(BLOCK))


def _sum_of_selves(kernel: Callable[[Tensor, Tensor], Tensor], part: Tensor) -> Tensor:
    """Of the kernel of each picture with itself."""
    return sum(kernel(block, block).diagonal().sum(dtype=torch.float64) for block in part.split(BLOCK))
