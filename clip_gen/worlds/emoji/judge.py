"""The judge: reads a scene from pixels without any network, and compares it with a description.

Analysis by synthesis: each layout is explained by the templates that fit its squares best, and the layout that leaves
least of the picture unexplained is read. Templates reward copies of the drawings that they are made of;
judge_network.py does not.

Measured on 500 random scenes of 128 pixels, with everything that can be said of a scene: name, colour, style, layout
and background. All renders were right. Of renders of 64 pixels 98.2 % were right, also with noise of 12 levels; with a
blur of 0.6 px 98.0 %, as JPEG of quality 60 98.4 %. Of the VQGAN's reconstructions (26.6 dB) 99.2 % were right. Of
spoilt pictures (spoiling.py) 14 % were still read as right, nearly half of them blurred ones. A picture takes 10 ms on
one thread.

A thing in the artist's colours has no colour in its scene. If a description states one, it is right if the best
template has that colour, or if at least half of the drawing's pixels are nearest to it in OKLab
(templates.natural_colours).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain, permutations
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_gen.worlds.emoji.captions import Description, ThingDescription
from clip_gen.worlds.emoji.scenes import (
    BACKGROUNDS,
    CORNERS,
    LARGE,
    LAYOUTS,
    OPPOSITE,
    RELATIONS,
    SIZES,
    SMALL,
)
from clip_gen.worlds.emoji.templates import CELL, SIDE, detail, means, natural_colours, templates
from clip_gen.worlds.emoji.words import kinds

TOP = 5  # names that a reading ranks
REFINED = 12  # names that are compared at all shifts
REACH = 2  # the greatest shift in pixels
STEPS = range(2 * REACH + 1)
READ_LAYOUTS = ("large", "small", *CORNERS, "left of", "above", "three", "four")  # the others have the same squares
LAYOUT_ATTRIBUTES = {"size": SIZES, "position": CORNERS, "relation": RELATIONS}
TOP_NAMES = f"name in the top {TOP}"

# Colours are fractions of full intensity, and distances between them Euclidean in sRGB.
MAX_GROUND_ERROR = 0.16  # distance of a background from the palette's colour
MAX_OUTSIDE = 0.2  # share of a picture's squared distance from the background outside the squares of its layout
MAX_LITTER = 0.18  # mean distance from the background in any 4 x 4 pixels outside the squares
MAX_ERROR = 0.2  # squared error of the best template, relative to its squared distance from the background
MAX_DAMAGE = 0.35  # error of the mean of any 4 x 4 pixels
MIN_DETAIL = 0.15  # squared differences of neighbouring pixels, relative to the template's; less is a blur


class ReadThing(NamedTuple):
    """names: the likeliest, best first. colour: None for the artist's colours. clear: whether the best name fits."""

    names: tuple[str, ...]
    style: str
    colour: str | None
    clear: bool

    def has_colour(self, colour: str) -> bool:
        return self.colour == colour or (self.colour is None and colour in natural_colours(self.names[0], self.style))


@dataclass(frozen=True)
class Reading:
    """layout: one of READ_LAYOUTS, with the things in the order of its squares."""

    background: str
    layout: str
    things: tuple[ReadThing, ...]

    @property
    def clean(self) -> bool:
        return all(thing.clear for thing in self.things)


def read(picture: np.ndarray) -> Reading | None:
    """Reads a square picture (S, S, 3) uint8, best of 64 px or more; None without a known background and layout."""
    pixels = resized(picture)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]), axis=0)
    distances = np.linalg.norm(np.float32(list(BACKGROUNDS.values())) / 255 - ground, axis=1)
    if distances.min() > MAX_GROUND_ERROR:
        return None
    offsets = pixels - ground
    layout, errors = _layout(offsets, ground)
    if layout is None or _littered(offsets, layout):
        return None
    found = (_thing(offsets, ground, square, errors[square]) for square in squares(layout))
    return Reading(list(BACKGROUNDS)[distances.argmin()], layout, tuple(found))


def resized(picture: np.ndarray) -> np.ndarray:
    """(64, 64, 3) float32 in [0, 1]."""
    assert picture.dtype == np.uint8, picture.dtype
    assert picture.shape == (len(picture), len(picture), 3), picture.shape
    if len(picture) != SIDE:
        picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))
    return picture / np.float32(255)


class Square(NamedTuple):
    """A place for a thing, in pixels of a picture of 64."""

    left: int
    top: int
    side: int

    def inside(self, margin: int = 0) -> tuple[slice, slice]:
        """The rows and the columns of the square with a margin around it."""
        return tuple(np.s_[start - margin : start + self.side + margin] for start in (self.top, self.left))


@cache
def squares(layout: str) -> tuple[Square, ...]:
    side = CELL * (LARGE if layout == "large" else SMALL)
    return tuple(Square(CELL * x, CELL * y, side) for x, y in LAYOUTS[layout])


def _layout(offsets: np.ndarray, ground: np.ndarray) -> tuple[str | None, dict[Square, np.ndarray]]:
    """The layout whose squares, with the best template in each, leave least of the picture unexplained; or None.

    With the errors of all templates for each square. offsets: (64, 64, 3) from the background's colour (3,).
    """
    strength = (means(offsets, CELL)[::CELL, ::CELL] ** 2).sum(axis=-1) * CELL**2  # (16, 16)
    outside = {layout: strength[_outside(layout)].sum() for layout in READ_LAYOUTS}
    possible = [layout for layout in READ_LAYOUTS if outside[layout] < MAX_OUTSIDE * strength.sum()]
    places = {square for layout in possible for square in squares(layout)}
    errors = {}
    for side in {square.side for square in places}:
        alike, table = [square for square in places if square.side == side], templates(side)
        crops = [means(offsets[square.inside()], table.cell)[:: table.cell, :: table.cell] for square in alike]
        errors |= zip(alike, table.errors(np.stack(crops), ground), strict=True)
    left = {layout: outside[layout] + sum(errors[square].min() for square in squares(layout)) for layout in possible}
    return min(left, key=left.get, default=None), errors


@cache
def _outside(layout: str) -> np.ndarray:
    """(16, 16) bool: the cells outside the layout's squares."""
    mask = np.ones((SIDE, SIDE), bool)
    for square in squares(layout):
        mask[square.inside()] = False
    return mask[::CELL, ::CELL]


def _littered(offsets: np.ndarray, layout: str) -> bool:
    """Whether there is anything outside the layout's squares."""
    rest = offsets.copy()
    for square in squares(layout):
        rest[square.inside(margin=1)] = 0
    return bool(np.linalg.norm(means(rest, CELL), axis=-1).max() > MAX_LITTER)


def _thing(offsets: np.ndarray, ground: np.ndarray, square: Square, errors: np.ndarray) -> ReadThing:
    """Compares the likeliest names again at small shifts; errors: of all templates without a shift."""
    table = templates(square.side)
    names = np.minimum.reduceat(errors, table.starts).argsort()[:REFINED]
    rows, cell, n = table.rows(names), table.cell, square.side // table.cell
    near = means(np.pad(offsets, ((REACH, REACH), (REACH, REACH), (0, 0))), cell)[square.top :, square.left :]
    crops = np.stack([near[y::cell, x::cell][:n, :n] for y in STEPS for x in STEPS])
    shifted = table.errors(crops, ground, rows)  # (shifts, rows)
    order = shifted.min(axis=0).argsort()
    best = rows[order[0]]
    ranked = tuple(dict.fromkeys(table.items[row].name for row in rows[order]))[:TOP]
    error, damage = table.misfit(crops[shifted[:, order[0]].argmin()], best, ground)
    sharp = detail(offsets[square.inside()]) > MIN_DETAIL * table.detail.on(ground)[best]
    clear = bool(error < MAX_ERROR and damage < MAX_DAMAGE and sharp)
    return ReadThing(ranked, table.items[best].style, table.items[best].colour, clear)


def satisfies(reading: Reading | None, description: Description) -> bool:
    """Whether everything that the description states is right; the order of its things does not matter."""
    return all(grade(reading, description).values())


def grade(reading: Reading | None, description: Description) -> dict[str, bool]:
    """Right or wrong for the number of things and for each stated attribute.

    Of the ways to match things the best one counts. An attribute is right if it is right for all things; those of a
    thing that is not clear are wrong. A layout is "size", "position" or "relation", or a count.
    """
    grades = dict.fromkeys(_stated(description), False)
    if reading is None:
        return grades
    wanted = len(LAYOUTS[description.layout]) if description.layout else len(description.things)
    seen = len(reading.things)
    grades["count"] = seen in (2, 3, 4) if description.many and not description.layout else seen == wanted
    if description.background:
        grades["background"] = reading.background == description.background
    for attribute in {"size", "position"} & set(grades):
        grades[attribute] = reading.layout == description.layout
    orders = [reading.things] if description.many else permutations(reading.things, len(description.things))
    matched = [grades | _grade_things(order, reading, description) for order in orders]
    return max(matched, key=lambda matching: sum(matching.values()), default=grades)


def _stated(description: Description) -> list[str]:
    layouts = [name for name, group in LAYOUT_ATTRIBUTES.items() if description.layout in group]
    backgrounds = ["background"] if description.background else []
    attributes = [_stated_of(thing, description.style) for thing in description.things]
    return list(dict.fromkeys(["count", *layouts, *backgrounds, *chain.from_iterable(attributes)]))


def _stated_of(said: ThingDescription, style: str | None) -> list[str]:
    """The attributes that a description states of a thing; if it states none, that there is a thing."""
    stated = {"name": said.name, TOP_NAMES: said.name, "kind": said.kind, "colour": said.colour, "style": style}
    return [name for name, value in stated.items() if value] or ["thing"]


def _grade_things(order: tuple[ReadThing, ...], reading: Reading, description: Description) -> dict[str, bool]:
    grades: dict[str, bool] = {}
    said = description.things * (len(order) if description.many else 1)
    for thing, wanted in zip(order, said, strict=True):
        right = _rights(thing, wanted, description.style)
        for name in _stated_of(wanted, description.style):
            grades[name] = grades.get(name, True) and right[name] and thing.clear
    if description.layout in RELATIONS and len(reading.things) == 2:
        layout = reading.layout if order[0] is reading.things[0] else OPPOSITE[reading.layout]
        grades["relation"] = layout == description.layout
    return grades


def _rights(thing: ReadThing, said: ThingDescription, style: str | None) -> dict[str, bool]:
    """Right or wrong for each attribute of a thing, whether it is stated or not."""
    return {
        "name": thing.names[0] == said.name,
        TOP_NAMES: said.name in thing.names,
        "kind": thing.names[0] in kinds().get(said.kind, ()),
        "colour": thing.has_colour(said.colour),
        "style": thing.style == style,
        "thing": True,
    }
