"""The scenes of the shapes world, and sampling them at random.

All lengths are fractions of the picture's side. x points right and y down; (0, 0) is the top left corner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")

# RGB, 0 to 255. All colours differ clearly from each other and from the backgrounds.
COLOURS = {
    "red": (222, 32, 38),
    "green": (40, 168, 60),
    "blue": (36, 72, 220),
    "yellow": (250, 214, 30),
    "orange": (246, 136, 22),
    "purple": (124, 40, 176),
    "pink": (250, 132, 190),
    "cyan": (40, 204, 224),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "brown": (104, 66, 36),
}

# Half the side of a shape's bounding square: (minimum, maximum). At 64 px: small 7.7 to 8.6, large 12.8 to 14.1.
OBJECT_SIZES = {"small": (0.12, 0.135), "large": (0.20, 0.22)}
MARGIN = 0.03  # between a bounding square and the picture's edge
MIN_GAP = 0.05  # between two bounding squares, along the axis of their relation

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# (colour, shape) pairs that only CLIP is trained on, not the VQGAN and the transformer.
HELD_OUT = frozenset(
    {("purple", "star"), ("yellow", "heart"), ("green", "cross"), ("orange", "ring"), ("cyan", "diamond")}
)


@dataclass(frozen=True)
class Item:
    """One shape: its three names, the centre of its bounding square, and half the square's side."""

    shape: str
    colour: str
    size: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.2

    @property
    def look(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.size

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """One item, or two; then `relation` is that of the first to the second."""

    background: str
    items: tuple[Item, ...]
    relation: str | None = None


def sample_scene(rng: np.random.Generator, *, count: int | None = None, held_out: str = "never") -> Scene:
    """A random scene of `count` items; None: of one or two.

    held_out: "never" excludes the held-out pairs, "may" allows them, "only" uses no others.
    """
    if count is None:
        count = int(rng.integers(1, 3))
    background = str(rng.choice(list(BACKGROUNDS)))
    first = _sample_item(rng, held_out)
    if count == 1:
        return place(rng, background, (first,))
    second = _sample_item(rng, held_out)
    while first.look == second.look:
        second = _sample_item(rng, held_out)
    return place(rng, background, (first, second), str(rng.choice(RELATIONS)))


def place(rng: np.random.Generator, background: str, items: tuple[Item, ...], relation: str | None = None) -> Scene:
    """The scene with items at random places that show the relation clearly, with random radii of their sizes."""
    sized = [replace(item, radius=float(rng.uniform(*OBJECT_SIZES[item.size]))) for item in items]
    if len(sized) == 1:
        return Scene(background, (_placed_anywhere(rng, sized[0]),))
    return Scene(background, _placed_in_relation(rng, sized[0], sized[1], relation), relation)


def another(rng: np.random.Generator, names: Iterable[str], current: str | None) -> str:
    """A random name that is not the current one."""
    return str(rng.choice([name for name in names if name != current]))


def _sample_item(rng: np.random.Generator, held_out: str) -> Item:
    if held_out not in ("never", "may", "only"):
        raise ValueError(f'held_out is "{held_out}"; it takes "never", "may" or "only"')
    size = str(rng.choice(list(OBJECT_SIZES)))
    if held_out == "only":
        colour, shape = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
        return Item(shape, colour, size)
    while True:
        item = Item(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), size)
        if held_out == "may" or not item.held_out:
            return item


def _placed_anywhere(rng: np.random.Generator, item: Item) -> Item:
    x, y = rng.uniform(MARGIN + item.radius, 1 - MARGIN - item.radius, size=2)
    return replace(item, x=float(x), y=float(y))


def _placed_in_relation(rng: np.random.Generator, first: Item, second: Item, relation: str) -> tuple[Item, Item]:
    """Both items where `relation` is clear: separated along its axis, and far from the diagonal."""
    before, after = (first, second) if relation in ("left of", "above") else (second, first)
    closest = before.radius + after.radius + MIN_GAP
    while True:
        # Takes the first of many random places that fits; for two large items one in a hundred does.
        a = rng.uniform(MARGIN + before.radius, 1 - MARGIN - before.radius, size=(64, 2))
        b = rng.uniform(MARGIN + after.radius, 1 - MARGIN - after.radius, size=(64, 2))
        along, across = b[:, 0] - a[:, 0], abs(b[:, 1] - a[:, 1])
        fits = (along >= closest) & (along >= 1.5 * across)
        if fits.any():
            a, b = a[fits.argmax()], b[fits.argmax()]
            break
    if relation in ("above", "below"):
        a, b = a[::-1], b[::-1]
    spots = (a, b) if before is first else (b, a)
    placed = [replace(item, x=float(x), y=float(y)) for item, (x, y) in zip((first, second), spots, strict=True)]
    return placed[0], placed[1]
