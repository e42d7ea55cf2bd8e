"""The judge: reads a scene from pixels without any network, and compares it with a description.

Analysis by synthesis: a picture has one or two blobs on a background. Each blob is compared with renders of all eight
shapes with the blob's area and centre of mass, and is read only if one render fits far better than the others.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_gen.worlds.shapes.captions import Description
from clip_gen.worlds.shapes.rendering import coverage
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, OBJECT_SIZES, SHAPES, Item, Scene

# A reading has the fields of a scene. Two items are ordered along the axis on which they are further apart, so their
# relation is always "left of" or "above".
Reading = Scene

SIDE = 64  # pixels; larger pictures are reduced to this, so that the limits below hold for all

# Distances between colours are Euclidean in RGB levels. Every item colour is at least 100 from every background and 79
# from every other item colour.
MIN_FOREGROUND = 50.0  # distance from the background of an item's pixels
MAX_COLOUR_ERROR = 45.0  # distance from the palette's colour
MAX_COLOUR_RATIO = 0.6  # distance from the nearest colour of the palette / from the second nearest
MAX_RESIDUAL = 20.0  # root mean square of what neither the background nor an item's colour explains
MAX_DEBRIS = 45.0  # mean distance from the background in any 2 x 2 pixels outside items
MIN_ITEM_PIXELS = 4
ITEM_ATTRIBUTES = ("shape", "colour", "size")

# Squared error of the best shape, relative to its area and to the error of the second best shape. For renders these
# are below 0.01 and 0.05, with slight blur and noise below 0.02 and 0.16. Halfway between two shapes the second is
# over 0.6.
MAX_ERROR = 0.04
MAX_ERROR_RATIO = 0.3
BLUR_STEPS = 6  # of 1/4 px² variance; a blob that needs all of them is too blurred
MAX_DAMAGE = 0.48  # mean error of coverage in any 2 x 2 pixels: a hole or a splash

RADII = (0.10, 0.25)  # smaller and larger items are neither small nor large
MIDDLE_RADIUS = (OBJECT_SIZES["small"][1] + OBJECT_SIZES["large"][0]) / 2


def read(picture: np.ndarray) -> Reading | None:
    """Reads a square picture (S, S, 3) uint8 of 48 px or more; None unless it is a clean picture of this world.

    A clean picture has one or two items of known shape, colour and size, none at the edge or blurred, and no debris.
    """
    pixels = _shrunk(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    backdrop = np.median(border, axis=0)
    background = _name(backdrop, BACKGROUNDS)
    if background is None:
        return None

    foreground = ((pixels - backdrop) ** 2).sum(axis=-1) > MIN_FOREGROUND**2
    blobs = [blob for blob in _blobs(foreground) if blob.sum() >= MIN_ITEM_PIXELS]
    if len(blobs) not in (1, 2) or any(_at_the_edge(blob) for blob in blobs):
        return None
    if _littered(pixels - backdrop, np.any(blobs, axis=0)):
        return None

    offsets = pixels - backdrop
    items = [_item(np.where(_grown(foreground & ~blob)[..., None], 0, offsets), backdrop, blob) for blob in blobs]
    if None in items:
        return None
    if len(items) == 2 and _relation(*items) in ("right of", "below"):
        items.reverse()
    return Reading(background, tuple(items), _relation(*items) if len(items) == 2 else None)


def satisfies(reading: Reading | None, description: Description) -> bool:
    """Whether everything that the description states is right; the order of its items does not matter."""
    return all(grade(reading, description).values())


def grade(reading: Reading | None, description: Description) -> dict[str, bool]:
    """Right or wrong for the number of items and for each stated attribute.

    Of the two ways to match items, the better one counts. An attribute is right if it is right for all items. Without
    a reading everything is wrong.
    """
    grades = dict.fromkeys(_stated(description), False)
    if reading is None:
        return grades
    grades["count"] = len(reading.items) == len(description.items)
    if description.background:
        grades["background"] = reading.background == description.background
    orders = permutations(reading.items, len(description.items))
    matched = [grades | _grade_items(items, description) for items in orders]
    return max(matched, key=lambda matching: sum(matching.values()), default=grades)


def _stated(description: Description) -> list[str]:
    attributes = [name for name in ITEM_ATTRIBUTES if any(getattr(item, name) for item in description.items)]
    return ["count", *(name for name in ("background", "relation") if getattr(description, name)), *attributes]


def _grade_items(items: tuple[Item, ...], description: Description) -> dict[str, bool]:
    grades: dict[str, bool] = {}
    for item, said in zip(items, description.items, strict=True):
        for name in ITEM_ATTRIBUTES:
            if getattr(said, name):
                grades[name] = grades.get(name, True) and getattr(said, name) == getattr(item, name)
    if description.relation:
        grades["relation"] = description.relation == _relation(*items)
    return grades


def _relation(first: Item, second: Item) -> str:
    right, down = second.x - first.x, second.y - first.y
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def _shrunk(picture: np.ndarray) -> np.ndarray:
    assert picture.dtype == np.uint8, picture.dtype
    assert picture.shape == (len(picture), len(picture), 3), picture.shape
    if len(picture) > SIDE:
        picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))
    return picture.astype(np.float32)


def _name(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = np.linalg.norm(np.float32(list(palette.values())) - colour, axis=1)
    nearest, second = np.sort(distances)[:2]
    if nearest > MAX_COLOUR_ERROR or nearest > MAX_COLOUR_RATIO * second:
        return None
    return list(palette)[distances.argmin()]


def _root_mean_square(colours: np.ndarray) -> float:
    return float(np.sqrt((colours**2).sum(axis=-1).mean()))


def _littered(offsets: np.ndarray, items: np.ndarray) -> bool:
    """Whether there is anything outside the mask `items` and its soft edge."""
    outside = ~_grown(_grown(items))
    patches = _patch_sums(np.where(outside[..., None], offsets, 0))
    debris = (patches**2).sum(axis=-1).max() > (4 * MAX_DEBRIS) ** 2
    return bool(debris or _root_mean_square(offsets[outside]) > MAX_RESIDUAL)


def _patch_sums(values: np.ndarray) -> np.ndarray:
    """The sums of all 2 x 2 patches of (h, w, ...)."""
    return values[1:, 1:] + values[1:, :-1] + values[:-1, 1:] + values[:-1, :-1]


def _at_the_edge(blob: np.ndarray) -> bool:
    return bool(blob[[0, -1]].any() or blob[:, [0, -1]].any())


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours above, below, left and right."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _blobs(mask: np.ndarray) -> list[np.ndarray]:
    """The mask's connected components, as masks."""
    blobs, rest = [], mask.copy()
    while rest.any():
        blob, grown = np.zeros_like(mask), np.zeros_like(mask)
        grown.flat[rest.argmax()] = True
        while (grown != blob).any():
            blob = grown
            grown = _grown(blob) & mask
        blobs.append(blob)
        rest &= ~blob
    return blobs


def _item(offsets: np.ndarray, backdrop: np.ndarray, blob: np.ndarray) -> Item | None:
    """The item of a blob; offsets (S, S, 3) from the backdrop's colour (3,), 0 where another item is."""
    strength = (offsets[blob] ** 2).sum(axis=-1)
    # The strongest third is the inside. This excludes the edges, which are most of a thin ring.
    colour = np.median(offsets[blob][strength >= np.quantile(strength, 2 / 3)], axis=0)
    name = _name(backdrop + colour, COLOURS)
    if name is None:
        return None

    # The soft edge is within two pixels around the blob.
    rows, columns = (np.flatnonzero(blob.any(axis=axis)) for axis in (1, 0))
    top, left = max(0, rows[0] - 2), max(0, columns[0] - 2)
    window = offsets[top : rows[-1] + 3, left : columns[-1] + 3]
    alpha = window @ colour / (colour @ colour)  # (h, w), 1 inside and 0 outside
    if _root_mean_square(window - alpha[..., None] * colour) > MAX_RESIDUAL:
        return None
    fit = _best_fit(alpha, top, left, len(blob))
    if fit is None or not RADII[0] <= fit.radius <= RADII[1]:
        return None
    size = "small" if fit.radius < MIDDLE_RADIUS else "large"
    return Item(fit.shape, name, size, fit.x, fit.y, fit.radius)


class _Fit(NamedTuple):
    """A shape's place and radius as fractions of the picture's side."""

    shape: str
    x: float
    y: float
    radius: float


def _best_fit(alpha: np.ndarray, top: int, left: int, side: int) -> _Fit | None:
    """The shape that fits `alpha` much better than the others, or None.

    alpha: coverage (h, w) in a window of the picture, about 1 inside the blob and 0 outside, with the whole soft edge.
    top, left: the window's offset in pixels. side: the picture's side in pixels.
    """
    fits = _candidates(alpha, top, left, side)
    if not fits:
        return None
    window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    sharp = np.stack([coverage(*fit, side)[window] for fit in fits])
    misses = [sharp - alpha]
    for _ in range(BLUR_STEPS):
        misses.append(_blurred(misses[-1] + alpha) - alpha)

    errors = np.array([(miss**2).sum(axis=(1, 2)) for miss in misses]) / alpha.sum()  # (blur steps + 1, shapes)
    least, second = np.sort(errors.min(axis=0))[:2]
    blur, best = np.unravel_index(errors.argmin(), errors.shape)
    damage = abs(_patch_sums(misses[blur][best])).max() / 4
    if least > MAX_ERROR or least > MAX_ERROR_RATIO * second or blur == BLUR_STEPS or damage > MAX_DAMAGE:
        return None
    return fits[best]


def _candidates(alpha: np.ndarray, top: int, left: int, side: int) -> list[_Fit]:
    """Each shape with the area and the centre of mass of `alpha`, which blur and noise do not change."""
    if alpha.sum() < 1:
        return []
    area, x, y = _mass(alpha)
    fits = []
    for shape in SHAPES:
        unit_area, across, down = _unit_mass(shape)
        radius = float(np.sqrt(area / unit_area))
        fits.append(_Fit(shape, (left + x - across * radius) / side, (top + y - down * radius) / side, radius / side))
    return fits


def _mass(alpha: np.ndarray) -> tuple[float, float, float]:
    """The area of a coverage (h, w), and x and y of its centre of mass, in pixels."""
    area = float(alpha.sum())
    x, y = (float(alpha.sum(axis=axis) @ (np.arange(alpha.shape[1 - axis]) + 0.5)) / area for axis in (0, 1))
    return area, x, y


@cache
def _unit_mass(shape: str) -> tuple[float, float, float]:
    """The area of the shape with radius 1, and x and y of its centre of mass from the centre of its square."""
    radius = 128
    area, x, y = _mass(coverage(shape, 0.5, 0.5, 0.5, 2 * radius))
    return area / radius**2, x / radius - 1, y / radius - 1


def _blurred(drawings: np.ndarray) -> np.ndarray:
    """Each (h, w) drawing blurred by a variance of 1/4 px²."""
    for before, after in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:, :, :-1], np.s_[:, :, 1:])):
        blurred = 0.75 * drawings
        blurred[after] += 0.125 * drawings[before]
        blurred[before] += 0.125 * drawings[after]
        drawings = blurred
    return drawings
