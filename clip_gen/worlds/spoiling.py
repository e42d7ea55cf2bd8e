"""Pictures with faults that generators make, and slightly degraded pictures that are still right; for all worlds.

Pictures are (S, S, 3) uint8. boxes: the squares of the things in it, (left, top, side) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

Box = tuple[float, float, float]
Colour = tuple[int, int, int]


def wear(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Degrades half of the pictures slightly, as a decoder does: tint, noise, blur. The caption stays true."""
    if rng.random() < 0.5:
        return picture
    image = Image.fromarray(picture)
    if rng.random() < 0.5:
        image = Image.blend(image, image.filter(ImageFilter.BoxBlur(1)), rng.uniform(0.1, 0.6))
    noise = rng.normal(0, 4, size=3) + rng.normal(0, rng.uniform(0, 8), size=picture.shape)
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def spots(
    boxes: Sequence[Box], rng: np.random.Generator, resolution: int, count: int, side: int
) -> list[tuple[int, int]]:
    """The top left corners of random blocks of `side` pixels on things."""
    corners = []
    for _ in range(count):
        left, top, size = boxes[rng.integers(len(boxes))]
        x, y = rng.uniform(0.05, 0.95, size=2) * size + (left, top) - side / 2
        corners.append((int(np.clip(x, 0, resolution - side)), int(np.clip(y, 0, resolution - side))))
    return corners


def bitten(picture: np.ndarray, boxes: Sequence[Box], background: Colour, rng: np.random.Generator) -> np.ndarray:
    """Holes in things."""
    resolution, spoilt = len(picture), picture.copy()
    side = int(resolution * rng.uniform(0.1, 0.22))
    for x, y in spots(boxes, rng, resolution, count=int(rng.integers(1, 4)), side=side):
        spoilt[y : y + side, x : x + side] = background
    return spoilt


def scrambled(picture: np.ndarray, boxes: Sequence[Box], rng: np.random.Generator) -> np.ndarray:
    """Blocks of things are exchanged, as with wrong tokens."""
    resolution, spoilt = len(picture), picture.copy()
    side = int(rng.choice([resolution // 16, resolution // 16, resolution // 8]))
    chosen = spots(boxes, rng, resolution, count=2 * int(rng.integers(2, 7)), side=side)
    for (x, y), (u, v) in zip(chosen[::2], chosen[1::2], strict=True):
        block = spoilt[y : y + side, x : x + side].copy()
        spoilt[y : y + side, x : x + side] = spoilt[v : v + side, u : u + side]
        spoilt[v : v + side, u : u + side] = block
    return spoilt


def littered(picture: np.ndarray, colours: Sequence[Colour], rng: np.random.Generator) -> np.ndarray:
    """Coloured squares at random places."""
    resolution, spoilt = len(picture), picture.copy()
    for _ in range(rng.integers(1, 5)):
        side = int(rng.integers(resolution // 16, resolution // 6))
        x, y = rng.integers(0, resolution - side, size=2)
        spoilt[y : y + side, x : x + side] = colours[rng.integers(len(colours))]
    return spoilt


def blurred(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    resolution = len(picture)
    small = Image.fromarray(picture).resize([max(4, resolution // int(rng.integers(5, 12)))] * 2)
    return np.asarray(small.resize((resolution, resolution), Image.Resampling.BICUBIC))
