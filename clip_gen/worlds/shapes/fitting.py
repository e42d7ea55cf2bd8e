"""Finds the shape that fits a blob best, by rendering all eight shapes and comparing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from clip_gen.worlds.shapes.rendering import coverage
from clip_gen.worlds.shapes.scenes import SHAPES

# Squared error of the best shape, relative to its area and to the error of the second best shape. For renders these
# are below 0.01 and 0.05, with slight blur and noise below 0.02 and 0.16. Halfway between two shapes the second is
# over 0.6.
MAX_ERROR = 0.04
MAX_ERROR_RATIO = 0.3
BLUR_STEPS = 6  # of 1/4 px² variance; a blob that needs all of them is too blurred
MAX_DAMAGE = 0.48  # mean error of coverage in any 2 x 2 pixels: a hole or a splash


@dataclass(frozen=True)
class Fit:
    """A shape's place and size as fractions of the picture's side."""

    shape: str
    x: float
    y: float
    radius: float


def fit_shape(alpha: np.ndarray, top: int, left: int, side: int) -> Fit | None:
    """The shape that fits `alpha` much better than the others, or None.

    alpha: coverage (h, w) in a window of the picture, about 1 inside the blob and 0 outside, with the whole soft edge.
    top, left: the window's offset in pixels. side: the picture's side in pixels.
    """
    fits = _candidates(alpha, top, left, side)
    if not fits:
        return None
    window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    sharp = np.stack([coverage(fit.shape, fit.x, fit.y, fit.radius, side)[window] for fit in fits])
    misses = [sharp - alpha]
    for _ in range(BLUR_STEPS):
        misses.append(_blurred(misses[-1] + alpha) - alpha)

    errors = np.array([(miss**2).sum(axis=(1, 2)) for miss in misses]) / alpha.sum()  # (blur steps + 1, shapes)
    least, second = np.sort(errors.min(axis=0))[:2]
    blur, best = np.unravel_index(errors.argmin(), errors.shape)
    unclear = least > MAX_ERROR or least > MAX_ERROR_RATIO * second or blur == BLUR_STEPS
    return None if unclear or _damage(misses[blur][best]) > MAX_DAMAGE else fits[best]


def _candidates(alpha: np.ndarray, top: int, left: int, side: int) -> list[Fit]:
    """Each shape with the area and the centre of mass of `alpha`, which blur and noise do not change."""
    area = float(alpha.sum())
    if area < 1:
        return []
    x = float(alpha.sum(axis=0) @ (np.arange(alpha.shape[1]) + left + 0.5)) / area
    y = float(alpha.sum(axis=1) @ (np.arange(alpha.shape[0]) + top + 0.5)) / area
    fits = []
    for shape in SHAPES:
        unit_area, across, down = _moments(shape)
        radius = float(np.sqrt(area / unit_area))
        fits.append(Fit(shape, (x - across * radius) / side, (y - down * radius) / side, radius / side))
    return fits


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """The area of the shape with radius 1, and x and y of its centre of mass from the centre of its square."""
    side = 256
    mask = coverage(shape, 0.5, 0.5, 0.5, side)
    at = (np.arange(side) + 0.5) / (side / 2) - 1
    area = float(mask.sum())
    return area / (side / 2) ** 2, float(mask.sum(axis=0) @ at / area), float(mask.sum(axis=1) @ at / area)


def _blurred(drawings: np.ndarray) -> np.ndarray:
    """Each (h, w) drawing blurred by a variance of 1/4 px²."""
    for before, after in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:, :, :-1], np.s_[:, :, 1:])):
        blurred = 0.75 * drawings
        blurred[after] += 0.125 * drawings[before]
        blurred[before] += 0.125 * drawings[after]
        drawings = blurred
    return drawings


def _damage(miss: np.ndarray) -> float:
    """The largest mean error of any 2 x 2 pixels."""
    patches = miss[1:, 1:] + miss[1:, :-1] + miss[:-1, 1:] + miss[:-1, :-1]
    return float(abs(patches).max() / 4)
