"""Values with 95 % confidence intervals."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z, T9 = 1.959964, 2.262157  # 97.5 % quantiles of the normal distribution, and of Student's t with 9 degrees of freedom
GROUPS = 10  # of the jackknife


@dataclass(frozen=True)
class Share:
    """`right` of `total`, with Wilson's 95 % interval (J. Am. Stat. Assoc. 22, 1927)."""

    right: int
    total: int

    @property
    def value(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        n, p = self.total, self.value
        centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
        # Exact at the ends, where rounding would leave the share itself outside.
        return (centre - half if self.right else 0.0, centre + half if self.right < n else 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:5.1f} % ({100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def share(hits: Tensor) -> Estimate:
    """The share of true values (N,) bool, with Wilson's interval."""
    found = Share(int(hits.sum()), len(hits))
    return Estimate(found.value, *found.interval)


def mean(values: Tensor) -> Estimate:
    """The mean of values (N,), with the normal interval; without an interval (NaN) for a single value."""
    values = values.double()
    half = Z * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    value = float(values.mean())
    return Estimate(value, value - half, value + half)


def of_tenths(values: Tensor) -> Estimate:
    """The mean of a figure of each tenth of the pictures, (10,), with Student's interval."""
    value, half = float(values.mean()), T9 * float(values.std()) / math.sqrt(GROUPS)
    return Estimate(value, value - half, value + half)


def jackknife(distance: Callable[[Tensor, Tensor], float], real: Tensor, generated: Tensor) -> Estimate:
    """The distance between two sets of features (N, D) and (M, D), with a jackknife interval.

    The distance is computed again without each tenth of both sets, and the interval is Student's (Quenouille and Tukey;
    Shao and Wu, Ann. Stat. 17, 1989). It has the variance only, not the bias of small sets. NaN below 20 pictures.
    """
    value = _collected(distance, real, generated)
    if min(len(real), len(generated)) < 2 * GROUPS:
        return Estimate(value, math.nan, math.nan)
    kept = [[torch.arange(len(part)) % GROUPS != group for part in (real, generated)] for group in range(GROUPS)]
    return leaving_out(value, [_collected(distance, real[first], generated[second]) for first, second in kept])


def _collected(distance: Callable[[Tensor, Tensor], float], real: Tensor, generated: Tensor) -> float:
    """The distance. Metrics of torchmetrics are reference cycles, and keep the features until they are collected."""
    value = distance(real, generated)
    gc.collect()
    return value


def leaving_out(value: float, others: Sequence[float]) -> Estimate:
    """The jackknife interval of a value, from the values without each tenth."""
    variance = float(torch.tensor(others, dtype=torch.float64).var(correction=0))
    error = math.sqrt((GROUPS - 1) * variance)
    return Estimate(value, value - T9 * error, value + T9 * error)
