"""Pictures of scenes with faults, so that no caption fits them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clip_gen.worlds import spoiling
from clip_gen.worlds.emoji.drawings import COLOURS, dominant_hue
from clip_gen.worlds.emoji.rendering import boxes, render
from clip_gen.worlds.emoji.sampling import another
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, COUNTS, Item, Scene, with_items
from clip_gen.worlds.emoji.words import things


def spoil(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """A picture (S, S, 3) uint8 of the scene with a random fault."""
    picture, squares = render(scene, resolution), boxes(scene, resolution)
    match rng.integers(8):
        case 0 | 1 | 2:
            spoilt = _chimera(scene, picture, rng)
        case 3 | 4:
            spoilt = spoiling.scrambled(picture, squares, rng)
        case 5:
            spoilt = spoiling.bitten(picture, squares, BACKGROUNDS[scene.background], rng)
        case 6:
            spoilt = spoiling.littered(picture, list(COLOURS.values()), rng)
        case _:
            spoilt = spoiling.blurred(picture, rng)
    return spoiling.wear(spoilt, rng)


def _chimera(scene: Scene, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One thing is a mixture of two, or has two colours."""
    items = list(scene.items[:1] if scene.layout in COUNTS else scene.items)
    which = int(rng.integers(len(items)))
    items[which] = _other(items[which], rng)
    other = render(with_items(scene, *items), len(picture))
    left, top, side = boxes(scene, len(picture))[which]
    cut = int(side * rng.uniform(0.3, 0.7))
    match rng.integers(3):
        case 0:
            return np.concatenate([picture[: top + cut], other[top + cut :]])
        case 1:
            return np.concatenate([picture[:, : left + cut], other[:, left + cut :]], axis=1)
        case _:
            return ((picture.astype(np.uint16) + other) // 2).astype(np.uint8)


def _other(item: Item, rng: np.random.Generator) -> Item:
    """Another thing, or the same in another colour."""
    if dominant_hue(item.name, item.style) is not None and rng.random() < 0.3:
        return replace(item, colour=another(rng, COLOURS, item.colour))
    return Item(another(rng, things(), item.name), item.style)
