"""Samples scenes at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from clip_gen.worlds.emoji.drawings import COLOURS, STYLES, dominant_hue
from clip_gen.worlds.emoji.rendering import is_visible
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, CORNERS, COUNTS, LAYOUTS, RELATIONS, Item, Scene
from clip_gen.worlds.emoji.words import things


# How often each layout is sampled. A large drawing has three times the tokens of a small one.
def _shares(large: float, small: float, corner: float, two: float, many: float) -> dict[str, float]:
    shares = {"large": large, "small": small} | dict.fromkeys(CORNERS, corner / len(CORNERS))
    return shares | dict.fromkeys(RELATIONS, two / len(RELATIONS)) | dict.fromkeys(COUNTS, many / len(COUNTS))


SHARES = _shares(large=0.48, small=0.05, corner=0.11, two=0.25, many=0.11)
RECOLOURED = 0.3  # share of the drawings with a dominant hue that get another colour
HARD_SHARES = _shares(large=0.30, small=0.03, corner=0.10, two=0.45, many=0.12)
HARD_RECOLOURED = 0.75


def sample_scene(
    rng: np.random.Generator,
    *,
    layout: str | None = None,
    held_out: str = "never",
    shares: Mapping[str, float] = SHARES,
    recoloured: float = RECOLOURED,
) -> Scene:
    """A random scene in which everything can be seen; of `layout`, or of the layouts with these shares.

    held_out: "never" excludes the held-out combinations, "may" allows them.
    """
    if held_out not in ("never", "may"):
        raise ValueError(f'held_out is "{held_out}"; it takes "never" or "may"')
    while True:
        scene = _sample(rng, layout or list(shares)[rng.choice(len(shares), p=list(shares.values()))], recoloured)
        if is_clear(scene) and (held_out == "may" or not scene.held_out):
            return scene


def is_clear(scene: Scene) -> bool:
    """Whether all items can be told from the background, and two items with a relation are different things."""
    names = {item.name for item in scene.items}
    distinct = scene.layout not in RELATIONS or len(names) == 2
    return distinct and all(is_visible(item, scene.background) for item in set(scene.items))


def _sample(rng: np.random.Generator, layout: str, recoloured: float) -> Scene:
    background, style = one_of(rng, BACKGROUNDS), one_of(rng, STYLES)
    items = tuple(sample_item(rng, style, recoloured) for _ in range(2 if layout in RELATIONS else 1))
    return Scene(background, layout, items if layout in RELATIONS else items * len(LAYOUTS[layout]))


def sample_item(rng: np.random.Generator, style: str, recoloured: float = RECOLOURED) -> Item:
    name, colour = one_of(rng, things()), None
    if rng.random() < recoloured and dominant_hue(name, style) is not None:
        colour = one_of(rng, COLOURS)
    return Item(name, style, colour)


def one_of(rng: np.random.Generator, names: Iterable[str]) -> str:
    """A random one of the names."""
    names = tuple(names)
    return names[rng.integers(len(names))]


def another(rng: np.random.Generator, names: Iterable[str], current: str | None) -> str:
    """A random name that is not the current one."""
    return one_of(rng, (name for name in names if name != current))
