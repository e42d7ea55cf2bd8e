"""The scenes of the emoji world.

Drawings have few places and two sizes, on a grid of 16 x 16 cells. With 256 tokens a picture a cell is a token, so a
drawing has the same tokens in every picture that has it at that size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

GRID = 16  # cells per side of a picture
LARGE, SMALL = 12, 7  # side of a drawing's square in cells

# The top left cells (x, y) of the squares of each layout. "large" and "small" have one thing in the middle.
LAYOUTS = {
    "large": ((2, 2),),
    "small": ((4, 4),),
    "top left": ((1, 1),),
    "top right": ((8, 1),),
    "bottom left": ((1, 8),),
    "bottom right": ((8, 8),),
    "left of": ((1, 4), (8, 4)),
    "right of": ((8, 4), (1, 4)),
    "above": ((4, 1), (4, 8)),
    "below": ((4, 8), (4, 1)),
    "two": ((1, 4), (8, 4)),
    "three": ((1, 1), (8, 1), (4, 8)),
    "four": ((1, 1), (8, 1), (1, 8), (8, 8)),
}
SIZES = ("large", "small")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("two", "three", "four")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GROUPS = {layout: group for group in (SIZES, CORNERS, RELATIONS, COUNTS) for layout in group}

# RGB, 0 to 255.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 20),
    "gray": (128, 130, 134),
    "red": (206, 62, 62),
    "orange": (244, 166, 84),
    "yellow": (250, 226, 110),
    "green": (110, 182, 110),
    "blue": (96, 150, 232),
    "light blue": (176, 216, 246),
    "purple": (160, 120, 214),
    "pink": (248, 186, 208),
    "brown": (134, 100, 74),
}


@dataclass(frozen=True)
class Item:
    """A drawing: what it shows, in whose style, and the colour that it was given; None: the artist's colours."""

    name: str
    style: str
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """One item; or two with a relation of the first to the second; or two to four of the same."""

    background: str
    layout: str
    items: tuple[Item, ...]

    @property
    def held_out(self) -> bool:
        """Whether it has a combination that the VQGAN and the transformer are not trained on."""
        return any(held_out_by(self))


def held_out_by(scene: Scene) -> tuple[bool, bool, bool, bool]:
    """Which of the four held-out sets it belongs to: backgrounds, colours, styles, relations."""
    sets, items = held_out(), scene.items
    related = scene.layout in RELATIONS and _triple(items[0].name, scene.layout, items[1].name)
    return (
        any((item.name, scene.background) in sets["backgrounds"] for item in items),
        any((item.name, item.colour) in sets["colours"] for item in items),
        any((item.name, item.style) in sets["styles"] for item in items),
        related in sets["relations"],
    )


@cache
def held_out() -> dict[str, frozenset[tuple[str, ...]]]:
    """Combinations that only CLIP is trained on: (thing, background), (thing, colour), (thing, style), and (thing,
    relation, thing), where the relation is "left of" or "above".
    """
    table = yaml.safe_load((Path(__file__).parent / "held_out.yaml").read_text(encoding="utf-8"))
    return {kind: frozenset(tuple(row.split(" | ")) for row in rows) for kind, rows in table.items()}


def _triple(first: str, relation: str, second: str) -> tuple[str, str, str]:
    return (second, OPPOSITE[relation], first) if relation in ("right of", "below") else (first, relation, second)


def with_items(scene: Scene, *items: Item) -> Scene:
    """The scene with other items. One item is repeated as often as the layout has places."""
    return replace(scene, items=items * (len(LAYOUTS[scene.layout]) // len(items)))
