"""Pictures of scenes with faults that generators make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clip_gen.worlds import spoiling
from clip_gen.worlds.shapes.rendering import coverage, render
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, another


def spoil(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """A picture (S, S, 3) uint8 of the scene with a random fault, so that no caption fits it."""
    picture = render(scene, resolution)
    boxes = [
        (resolution * (item.x - item.radius), resolution * (item.y - item.radius), 2 * resolution * item.radius)
        for item in scene.items
    ]
    match rng.integers(8):
        case 0 | 1:
            spoilt = _chimera(scene, rng, resolution)
        case 2 | 3:
            spoilt = spoiling.scrambled(picture, boxes, rng)
        case 4:
            spoilt = spoiling.bitten(picture, boxes, BACKGROUNDS[scene.background], rng)
        case 5:
            spoilt = _two_coloured(scene, rng, resolution)
        case 6:
            spoilt = spoiling.littered(picture, list(COLOURS.values()), rng)
        case _:
            spoilt = spoiling.blurred(picture, rng)
    return spoiling.wear(spoilt, rng)


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
    spoilt = picture + first[..., None] * (np.float32(COLOURS[item.colour]) - picture)
    return spoilt.clip(0, 255).astype(np.uint8)


def _two_coloured(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """One item has two colours."""
    which = int(rng.integers(len(scene.items)))
    item = scene.items[which]
    recoloured = scene.with_item(which, replace(item, colour=another(rng, COLOURS, item.colour)))
    picture = render(scene, resolution)
    row = int(resolution * (item.y + rng.uniform(-0.5, 0.5) * item.radius))
    picture[row:] = render(recoloured, resolution)[row:]
    return picture
