"""Renders scenes: drawings on a plain background."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from clip_gen.worlds.emoji.drawings import drawing, recoloured, to_oklab
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, GRID, LARGE, LAYOUTS, SMALL, Item, Scene

# A drawing is visible if so many of its pixels are so far from the background in OKLab.
MIN_DISTANCE, MIN_SHARE = 0.12, 0.6


def is_visible(item: Item, background: str) -> bool:
    """Whether the item can be told from the background."""
    return background in _visible_on(item)


@cache
def _visible_on(item: Item) -> frozenset[str]:
    pixels = _pixels(item)
    inside = pixels[pixels[..., 3] > 128][::7, :3]
    lab, grounds = to_oklab(inside / np.float32(255)), to_oklab(np.float32(list(BACKGROUNDS.values())) / 255)
    distances = np.linalg.norm(lab[:, None] - grounds, axis=2)
    shares = (distances > MIN_DISTANCE).mean(axis=0)
    return frozenset(name for name, share in zip(BACKGROUNDS, shares, strict=True) if share > MIN_SHARE)


def _pixels(item: Item) -> np.ndarray:
    return drawing(item.name, item.style) if item.colour is None else recoloured(item.name, item.style, item.colour)


@cache
def sprite(item: Item, side: int, margin: int) -> np.ndarray:
    """The drawing in the middle of a square, (side, side, 4) uint8: RGB times alpha, and alpha.

    It touches two opposite edges of the square's inside, at `margin` pixels from the edges.
    """
    image = Image.fromarray(_pixels(item))
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()).convert("RGBa")
    scale = (side - 2 * margin) / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    square = Image.new("RGBa", (side, side))
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)


def boxes(scene: Scene, resolution: int) -> list[tuple[int, int, int]]:
    """The squares of the scene's items in pixels: left, top and side."""
    cell = resolution // GRID
    side = cell * (LARGE if scene.layout == "large" else SMALL)
    return [(cell * x, cell * y, side) for x, y in LAYOUTS[scene.layout]]


def render(scene: Scene, resolution: int = 64) -> np.ndarray:
    """The scene as (resolution, resolution, 3) uint8 RGB. resolution: a multiple of 16.

    Edges are blended in sRGB, as browsers blend emoji on a page.
    """
    assert resolution % GRID == 0, resolution
    picture = np.empty((resolution, resolution, 3), np.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    for item, (left, top, side) in zip(scene.items, boxes(scene, resolution), strict=True):
        drawn = sprite(item, side, max(1, resolution // 64))
        place = picture[top : top + side, left : left + side]
        shown = (place * (255 - drawn[..., 3:].astype(np.uint16)) + 127) // 255
        place[:] = np.minimum(drawn[..., :3] + shown, 255)  # the filter overshoots at hard edges
    return picture
