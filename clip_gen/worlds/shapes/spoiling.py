"""Pictures with faults that generators make, and slightly degraded pictures that are still right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from clip_gen.worlds.shapes.rendering import coverage, render
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, another


def wear(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Degrades half of the pictures slightly, as a decoder does: tint, noise, blur. The caption stays true."""
    if rng.random() < 0.5:
        return picture
    image = Image.fromarray(picture)
    if rng.random() < 0.5:
        image = Image.blend(image, image.filter(ImageFilter.BoxBlur(1)), rng.uniform(0.1, 0.6))
    noise = rng.normal(0, 4, size=3) + rng.normal(0, rng.uniform(0, 8), size=picture.shape)
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def spoil(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """A picture (S, S, 3) uint8 of the scene with a random fault, so that no caption fits it."""
    ways = (_chimera, _chimera, _bitten, _scrambled, _scrambled, _two_coloured, _littered, _blurred)
    picture = ways[rng.integers(len(ways))](scene, rng, resolution)
    return wear(picture.clip(0, 255).astype(np.uint8), rng)


def _chimera(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """One item is a mixture of two shapes."""
    which = int(rng.integers(len(scene.items)))
    item = scene.items[which]
    rest = replace(scene, items=(*scene.items[:which], *scene.items[which + 1 :]))
    picture = render(rest, resolution).astype(np.float32)
    first = coverage(item.shape, item.x, item.y, item.radius, resolution)
    second = coverage(another(rng, SHAPES, item.shape), item.x, item.y, item.radius, resolution)
    row = int(resolution * (item.y + rng.uniform(-0.4, 0.4) * item.radius))
    match rng.integers(4):
        case 0:
            first[row:] = second[row:]
        case 1:
            column = int(resolution * (item.x + rng.uniform(-0.4, 0.4) * item.radius))
            first[:, column:] = second[:, column:]
        case 2:
            first = (first + second) / 2
        case _:
            first = abs(first - second)
    return picture + first[..., None] * (np.float32(COLOURS[item.colour]) - picture)


def _spots(scene: Scene, rng: np.random.Generator, resolution: int, count: int, side: int) -> list[tuple[int, int]]:
    """The top left corners of random blocks on items."""
    spots = []
    for _ in range(count):
        item = scene.items[rng.integers(len(scene.items))]
        x, y = (rng.uniform(-0.9, 0.9, size=2) * item.radius + (item.x, item.y)) * resolution - side / 2
        spots.append((int(np.clip(x, 0, resolution - side)), int(np.clip(y, 0, resolution - side))))
    return spots


def _bitten(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    picture = render(scene, resolution)
    side = int(resolution * rng.uniform(0.1, 0.22))
    for x, y in _spots(scene, rng, resolution, count=int(rng.integers(1, 4)), side=side):
        picture[y : y + side, x : x + side] = BACKGROUNDS[scene.background]
    return picture


def _scrambled(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Blocks of items are exchanged, as with wrong tokens."""
    picture = render(scene, resolution)
    side = int(rng.choice([resolution // 16, resolution // 16, resolution // 8]))
    spots = _spots(scene, rng, resolution, count=2 * int(rng.integers(2, 7)), side=side)
    for (x, y), (u, v) in zip(spots[::2], spots[1::2], strict=True):
        block = picture[y : y + side, x : x + side].copy()
        picture[y : y + side, x : x + side] = picture[v : v + side, u : u + side]
        picture[v : v + side, u : u + side] = block
    return picture


def _two_coloured(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """One item has two colours."""
    which = int(rng.integers(len(scene.items)))
    item = scene.items[which]
    recoloured = scene.with_item(which, replace(item, colour=another(rng, COLOURS, item.colour)))
    picture = render(scene, resolution)
    row = int(resolution * (item.y + rng.uniform(-0.5, 0.5) * item.radius))
    picture[row:] = render(recoloured, resolution)[row:]
    return picture


def _littered(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Coloured squares at random places."""
    picture = render(scene, resolution)
    for _ in range(rng.integers(1, 5)):
        side = int(rng.integers(resolution // 16, resolution // 6))
        x, y = rng.integers(0, resolution - side, size=2)
        picture[y : y + side, x : x + side] = COLOURS[str(rng.choice(list(COLOURS)))]
    return picture


def _blurred(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    small = Image.fromarray(render(scene, resolution)).resize([max(4, resolution // int(rng.integers(5, 12)))] * 2)
    return np.asarray(small.resize((resolution, resolution), Image.Resampling.BICUBIC))
