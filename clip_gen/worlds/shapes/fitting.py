"""How much of each pixel something covers -> the one shape that explains it, by drawing all eight and comparing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from clip_gen.worlds.shapes.rendering import coverage
from clip_gen.worlds.shapes.scenes import SHAPES

# Squared error of the best drawing over its area, and over the error of the second best shape. Renders stay below
# 0.01 and 0.05, with slight blur and noise below 0.02 and 0.16; halfway between two shapes the second is 0.6 up.
ERROR = 0.04
DOUBT = 0.3
SOFTENINGS = 6  # steps of 1/4 px² of blur that a drawing may need; with this many it is a smear
DAMAGE = 0.48  # mean coverage missing or too much in any 2 x 2 pixels: a hole, a nick, a splash


@dataclass(frozen=True)
class Fit:
    """A shape where the renderer would draw it, in fractions of the picture's side."""

    shape: str
    x: float
    y: float
    radius: float


def fit_shape(alpha: np.ndarray, top: int, left: int, side: int) -> Fit | None:
    """The shape that explains `alpha` better than the others do by far, or None.

    alpha: coverage in a window of the picture, (h, w), about 0 outside the shape and 1 inside, the whole of the
    soft edge in it. top, left: where the window starts, in pixels. side: the picture's, in pixels.
    """
    fits = _candidates(alpha, top, left, side)
    if not fits:
        return None
    window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    sharp = np.stack([coverage(fit.shape, fit.x, fit.y, fit.radius, side)[window] for fit in fits])
    misses = [sharp - alpha]
    for _ in range(SOFTENINGS):
        misses.append(_softened(misses[-1] + alpha) - alpha)

    errors = np.array([(miss**2).sum(axis=(1, 2)) for miss in misses]) / alpha.sum()  # (softenings + 1, shapes)
    least, second = np.sort(errors.min(axis=0))[:2]
    softening, best = np.unravel_index(errors.argmin(), errors.shape)
    unclear = least > ERROR or least > DOUBT * second or softening == SOFTENINGS
    return None if unclear or _damage(misses[softening][best]) > DAMAGE else fits[best]


def _candidates(alpha: np.ndarray, top: int, left: int, side: int) -> list[Fit]:
    """Every shape with the area and the centre of mass of `alpha`, which blur and noise leave where they are."""
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
    """Of the shape with radius 1: its area, and its centre of mass right of and below its box's centre."""
    side = 256
    mask = coverage(shape, 0.5, 0.5, 0.5, side)
    at = (np.arange(side) + 0.5) / (side / 2) - 1
    area = float(mask.sum())
    return area / (side / 2) ** 2, float(mask.sum(axis=0) @ at / area), float(mask.sum(axis=1) @ at / area)


def _softened(drawings: np.ndarray) -> np.ndarray:
    """Each (h, w) drawing blurred by a variance of 1/4 px²."""
    for before, after in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:, :, :-1], np.s_[:, :, 1:])):
        softer = 0.75 * drawings
        softer[after] += 0.125 * drawings[before]
        softer[before] += 0.125 * drawings[after]
        drawings = softer
    return drawings


def _damage(miss: np.ndarray) -> float:
    """The largest mean miss of any 2 x 2 pixels."""
    patches = miss[1:, 1:] + miss[1:, :-1] + miss[:-1, 1:] + miss[:-1, :-1]
    return float(abs(patches).max() / 4)
