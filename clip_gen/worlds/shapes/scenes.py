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

    def with_item(self, number: int, item: Item) -> Scene:
        """This scene with another item in the place of one."""
        return replace(self, items=(*self.items[:number], item, *self.items[number + 1 :]))


def sample_scene(rng: np.random.Generator, *, count: int | None = None, held_out: str = "never") -> Scene:
    """A random scene of `count` items; None: of one or two.

    held_out: "never" excludes the held-out pairs, "may" allows them, "only" uses no others.
    """
    if held_out not in ("never", "may", "only"):
        raise ValueError(f'held_out is "{held_out}"; it takes "never", "may" or "only"')
    if count is None:
        count = int(rng.integers(1, 3))
    background = str(rng.choice(list(BACKGROUNDS)))
    items: list[Item] = []
    while len(items) < count:
        item = _sample_item(rng, held_out)
        if item not in items:
            items.append(item)
    relation = str(rng.choice(RELATIONS)) if count == 2 else None
    return place(Scene(background, tuple(items), relation), rng)


def place(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with items at random places that show the relation clearly, with random radii of their sizes."""
    radii = [float(rng.uniform(*OBJECT_SIZES[item.size])) for item in scene.items]
    places = _related_places(radii, scene.relation, rng) if scene.relation else _places(radii[0], rng)
    placed = [
        replace(item, x=float(x), y=float(y), radius=radius)
        for item, radius, (x, y) in zip(scene.items, radii, places, strict=True)
    ]
    return replace(scene, items=tuple(placed))


def another(rng: np.random.Generator, names: Iterable[str], current: str | None) -> str:
    """A random name that is not the current one."""
    return str(rng.choice([name for name in names if name != current]))


def _sample_item(rng: np.random.Generator, held_out: str) -> Item:
    size = str(rng.choice(list(OBJECT_SIZES)))
    if held_out == "only":
        colour, shape = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
        return Item(shape, colour, size)
    while True:
        item = Item(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), size)
        if held_out == "may" or not item.held_out:
            return item


def _places(radius: float, rng: np.random.Generator, count: int = 1) -> np.ndarray:
    """Random places (count, 2) for a shape of this radius."""
    return rng.uniform(MARGIN + radius, 1 - MARGIN - radius, size=(count, 2))


def _related_places(radii: list[float], relation: str, rng: np.random.Generator) -> np.ndarray:
    """Places (2, 2) where `relation` is clear: separated along its axis, and far from the diagonal."""
    order = 1 if relation in ("left of", "above") else -1
    before, after = radii[::order]
    while True:
        # Takes the first of many random places that fits; for two large items one in a hundred does.
        pairs = np.stack([_places(before, rng, 64), _places(after, rng, 64)], axis=1)  # (64, 2, 2)
        along, across = (pairs[:, 1] - pairs[:, 0]).T
        fits = (along >= before + after + MIN_GAP) & (along >= 1.5 * abs(across))
        if fits.any():
            axes = 1 if relation in ("left of", "right of") else -1
            return pairs[fits.argmax(), ::order, ::axes]
