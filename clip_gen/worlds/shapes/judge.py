"""The judge: reads a scene from pixels without any network, and compares it with a description.

Analysis by synthesis: a picture has one or two blobs on a background. Each blob is compared with renders of all eight
shapes with the blob's area and centre of mass, and is read only if one render fits far better than the others.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from PIL import Image

from clip_gen.worlds.shapes.captions import Description
from clip_gen.worlds.shapes.fitting import fit_shape
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, OBJECT_SIZES, Item, Scene

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

    items = []
    for blob in blobs:
        others = _grown(foreground & ~blob)
        item = _item(np.where(others[..., None], backdrop, pixels), backdrop, blob)
        if item is None:
            return None
        items.append(item)
    return _reading(background, items)


def satisfies(reading: Reading | None, description: Description) -> bool:
    """Whether everything that the description states is right; the order of its items does not matter."""
    return all(grade(reading, description).values())


def grade(reading: Reading | None, description: Description) -> dict[str, bool]:
    """Right or wrong for the number of items and for each stated attribute.

    Of the two ways to match items, the better one counts. An attribute is right if it is right for all items. Without
    a reading everything is wrong.
    """
    wrong = dict.fromkeys(_stated(description), False)
    if reading is None:
        return wrong
    wrong["count"] = len(reading.items) == len(description.items)
    if "background" in wrong:
        wrong["background"] = reading.background == description.background
    matched = [
        wrong | _grade_items(items, description) for items in permutations(reading.items, len(description.items))
    ]
    return max(matched, key=lambda grades: sum(grades.values()), default=wrong)


def _stated(description: Description) -> list[str]:
    stated = {"background": description.background, "relation": description.relation}
    for name in ("shape", "colour", "size"):
        stated[name] = any(getattr(item, name) for item in description.items)
    return ["count", *(name for name, value in stated.items() if value)]


def _grade_items(items: tuple[Item, ...], description: Description) -> dict[str, bool]:
    grades: dict[str, bool] = {}
    for item, said in zip(items, description.items, strict=True):
        for name in ("shape", "colour", "size"):
            if getattr(said, name) is not None:
                right = getattr(said, name) == getattr(item, name)
                grades[name] = grades.get(name, True) and right
    if description.relation is not None:
        grades["relation"] = description.relation == _relation(*items)
    return grades


def _relation(first: Item, second: Item) -> str:
    right, down = second.x - first.x, second.y - first.y
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def _reading(background: str, items: list[Item]) -> Reading:
    if len(items) == 1:
        return Reading(background, tuple(items))
    relation = _relation(*items)
    if relation in ("left of", "above"):
        return Reading(background, tuple(items), relation)
    return _reading(background, items[::-1])


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
    rest = np.where(outside[..., None], offsets, 0)
    patches = rest[1:, 1:] + rest[1:, :-1] + rest[:-1, 1:] + rest[:-1, :-1]
    debris = (patches**2).sum(axis=-1).max() > (4 * MAX_DEBRIS) ** 2
    return bool(debris or _root_mean_square(offsets[outside]) > MAX_RESIDUAL)


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
    """The mask's connected components, as masks: runs in a row are joined to the runs above that they touch."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    runs = np.cumsum(starts).reshape(mask.shape) - 1
    parents = list(range(int(starts.sum())))

    def root(run: int) -> int:
        while parents[run] != run:
            run = parents[run]
        return run

    touching = mask[:-1] & mask[1:]
    for above, below in set(zip(runs[:-1][touching].tolist(), runs[1:][touching].tolist(), strict=True)):
        parents[root(above)] = root(below)
    roots = np.array([root(run) for run in parents], int)
    labels = np.where(mask, roots[runs], -1) if parents else runs
    return [labels == label for label in sorted(set(roots.tolist()))]


def _item(pixels: np.ndarray, backdrop: np.ndarray, blob: np.ndarray) -> Item | None:
    offsets = pixels - backdrop
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
    fit = fit_shape(alpha, top, left, len(blob))
    if fit is None or not RADII[0] <= fit.radius <= RADII[1]:
        return None
    size = "small" if fit.radius < MIDDLE_RADIUS else "large"
    return Item(fit.shape, name, size, fit.x, fit.y, fit.radius)
