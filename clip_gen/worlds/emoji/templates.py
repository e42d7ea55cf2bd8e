"""Small templates of all drawings in all colours, with which the judge compares pictures by matrix products.

Colours are fractions of full intensity. Templates have no background: since both sides of a comparison are offsets from
the background's colour, a template r - a b is linear in the background b (r: colour times alpha, a: alpha).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from clip_gen.worlds.emoji.drawings import (
    COLOURS,
    HUE_WIDTH,
    MIN_CHROMA,
    STYLES,
    dominant_hue,
    drawing,
    from_oklab,
    to_oklab,
)
from clip_gen.worlds.emoji.rendering import OUTLINE, bare_sprite, outlined
from clip_gen.worlds.emoji.scenes import GRID, Item
from clip_gen.worlds.emoji.words import things

SIDE = 64  # of the pictures that templates are compared with, in pixels
CELL = SIDE // GRID
MIN_NATURAL = 0.5  # share of the pixels


class Norms(NamedTuple):
    """Sums over pixels of the squares of r - a b, for T templates."""

    squares: np.ndarray  # (T)
    products: np.ndarray  # (T, 3)
    areas: np.ndarray  # (T)

    @classmethod
    def of(cls, values: np.ndarray, pixels: int) -> Norms:
        """values: (T, n, 4), r and a; pixels: how many pixels each of the n stands for."""
        colours, alpha = values[..., :3], values[..., 3:]
        sums = (colours**2).sum(axis=(1, 2)), (colours * alpha).sum(axis=1), (alpha**2).sum(axis=(1, 2))
        return cls(*(pixels * part for part in sums))

    @classmethod
    def joined(cls, parts: list[Norms]) -> Norms:
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def on(self, ground: np.ndarray) -> np.ndarray:
        """(T): the sums on a background (3,)."""
        return self.squares - 2 * self.products @ ground + self.areas * (ground @ ground)


@dataclass(frozen=True)
class Templates:
    """The templates for squares of one size, reduced to n x n cells of `cell` pixels a side.

    items: (T), ordered by name. starts: the first row of each name. matrix: (T, 4 n n): red, green and blue of all
    cells, then alpha. energy, detail: squared distances from the background, and squared differences of neighbouring
    pixels.
    """

    items: list[Item]
    starts: np.ndarray
    matrix: np.ndarray
    cell: int
    energy: Norms
    detail: Norms

    def rows(self, names: np.ndarray) -> np.ndarray:
        """The rows of names, given by their numbers."""
        ends = np.append(self.starts[1:], len(self.items))
        return np.concatenate([np.arange(self.starts[name], ends[name]) for name in names])

    def errors(self, crops: np.ndarray, ground: np.ndarray, rows: np.ndarray | slice = np.s_[:]) -> np.ndarray:
        """Squared distances (k, rows) of crops (k, n, n, 3) from the templates on the background (3,), over pixels.

        The crops are offsets from the background.
        """
        values = np.moveaxis(crops, 3, 1).reshape(len(crops), -1)
        alpha = -(crops @ ground).reshape(len(crops), -1)
        products = np.concatenate([values, alpha], axis=1) @ self.matrix[rows].T
        return self.energy.on(ground)[rows] + self.cell**2 * ((values**2).sum(axis=1)[:, None] - 2 * products)

    def misfit(self, crop: np.ndarray, row: int, ground: np.ndarray) -> tuple[float, float]:
        """The squared error relative to the template's energy, and the greatest error of the mean of 4 x 4 pixels."""
        parts = self.matrix[row].reshape(4, *crop.shape[:2])
        drawn = np.moveaxis(parts[:3] - parts[3] * ground[:, None, None], 0, 2)
        error = crop - drawn
        damage = np.linalg.norm(means(error, CELL // self.cell), axis=-1).max()
        return float((error**2).sum() / (drawn**2).sum()), float(damage)


@cache
def templates(side: int) -> Templates:
    """The templates for squares of `side` pixels. The first call takes seconds."""
    cell = CELL if side > SIDE // 2 else CELL // 2
    n, items, matrix, energy, detail = side // cell, [], [], [], []
    for name, style in product(things(), STYLES):
        colours, drawn = _variants(name, style, side)
        cells = drawn.reshape(-1, n, cell, n, cell, 4).mean(axis=(2, 4))  # (k, n, n, 4)
        items += [Item(name, style, colour) for colour in colours]
        matrix.append(np.moveaxis(cells, 3, 1).reshape(len(colours), -1))
        energy.append(Norms.of(cells.reshape(len(colours), -1, 4), cell**2))
        detail.append(Norms.of(_steps(drawn), 1))
    names = [item.name for item in items]
    starts = np.array([names.index(name) for name in things()])
    return Templates(items, starts, np.concatenate(matrix), cell, Norms.joined(energy), Norms.joined(detail))


def _variants(name: str, style: str, side: int) -> tuple[list[str | None], np.ndarray]:
    """A drawing in the artist's colours (None) and, if it has a dominant hue, in all others.

    With (k, side, side, 4): colour times alpha, and alpha. The colours change as in drawings.recoloured, but at this
    size, where it is far quicker.
    """
    # As the model's pictures, of twice the size, look when they are reduced.
    bare = bare_sprite(Item(name, style), 2 * side, 2)
    natural, whole = (
        drawn.reshape(side, 2, side, 2, 4).mean(axis=(1, 3), dtype=np.float32) / 255
        for drawn in (bare, outlined(bare, 2 * OUTLINE))
    )
    outline, hue = whole - natural, dominant_hue(name, style)
    if hue is None:
        return [None], (natural + outline)[None]
    alpha = natural[..., 3:]
    lab = to_oklab((natural[..., :3] / alpha.clip(1e-3)).clip(0, 1))
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    turn = np.abs((np.arctan2(lab[..., 2], lab[..., 1]) - hue + np.pi) % (2 * np.pi) - np.pi)
    changed = (turn < 1.3 * HUE_WIDTH) & (chroma > MIN_CHROMA / 2)
    typical = changed & (alpha[..., 0] > 0.5) & (chroma > MIN_CHROMA)
    lightness, scale = lab[..., 0] - np.median(lab[typical][:, 0]), chroma / np.median(chroma[typical])
    targets = to_oklab(np.float32(list(COLOURS.values())) / 255)[:, None]  # (colours, 1, 3)
    parts = [lightness[changed] + targets[..., 0], *(scale[changed] * targets[..., axis] for axis in (1, 2))]
    drawn = np.stack([natural] * (1 + len(COLOURS)))
    mixed = from_oklab(np.stack(parts, axis=-1).clip([0, -1, -1], [1, 1, 1]))  # (colours, changed pixels, 3)
    drawn[1:, changed, :3] = mixed * alpha[changed]
    return [None, *COLOURS], drawn + outline


def _steps(values: np.ndarray) -> np.ndarray:
    """The differences of neighbouring pixels of (k, h, w, C), across and down: (k, n, C)."""
    steps = [np.diff(values, axis=axis).reshape(len(values), -1, values.shape[-1]) for axis in (1, 2)]
    return np.concatenate(steps, axis=1)


def detail(pixels: np.ndarray) -> float:
    """The squared differences of neighbouring pixels of (h, w, 3), summed."""
    return float((_steps(pixels[None]) ** 2).sum())


def means(values: np.ndarray, size: int) -> np.ndarray:
    """The means of all windows of size x size pixels of (h, w, 3), by the window's first row and column."""
    sums = np.pad(values, ((1, 0), (1, 0), (0, 0))).cumsum(axis=0).cumsum(axis=1)
    window = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    return window / np.float32(size**2)


@cache
def natural_colours(name: str, style: str) -> frozenset[str]:
    """The colour that a drawing has by itself: at least half of its pixels are nearer to it, in OKLab, than to the
    other colours, black, gray and white. Empty for many drawings.
    """
    pixels = drawing(name, style)
    lab = to_oklab(pixels[pixels[..., 3] > 128][::7, :3] / np.float32(255))
    grays = [(level,) * 3 for level in (20, 128, 250)]
    palette = to_oklab(np.float32([*COLOURS.values(), *grays]) / 255)
    nearest = np.linalg.norm(lab[:, None] - palette, axis=2).argmin(axis=1)
    return frozenset(colour for number, colour in enumerate(COLOURS) if (nearest == number).mean() >= MIN_NATURAL)
