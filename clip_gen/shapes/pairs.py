"""Pictures with captions for the small CLIP, and pictures alone for everything else. All endless, from a seed.

A CLIP that sees random pairs learns what is easy. So its batches are built of near misses (scenes that differ in one
attribute), and of spoilt pictures that no caption fits, because it will have to rank what a generator draws.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clip_gen.shapes.captions import Description, describe, leave_unsaid, vary
from clip_gen.shapes.rendering import coverage, render
from clip_gen.shapes.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Item, Scene, place, sample_scene

UNSAID = -1
ABSENT = -2


class RenderedPictures(Dataset):
    """Picture i of a seed, (S, S, 3) uint8. Held-out pairs never occur."""

    def __init__(self, count: int, seed: int, resolution: int):
        self.count, self.seed, self.resolution = count, seed, resolution

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return render(sample_scene(np.random.default_rng([self.seed, index])), self.resolution)


class PairGroup(NamedTuple):
    """Near misses of one scene with their captions, and spoilt versions of one of them."""

    pictures: np.ndarray  # (G, S, S, 3) uint8
    captions: list[str]  # G
    stated: np.ndarray  # (G, 9): what each caption says, UNSAID where it does not
    shown: np.ndarray  # (G, 9): what each picture shows
    spoilt: np.ndarray  # (1, S, S, 3) uint8


class CaptionedPairs(Dataset):
    """Group i of a seed."""

    def __init__(self, count: int, seed: int, resolution: int, group: int = 4):
        self.count, self.seed, self.resolution, self.group = count, seed, resolution, group

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> PairGroup:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        scenes = [sample_scene(rng, held_out="may")]
        while len(scenes) < self.group:
            scenes.append(near_miss(scenes[rng.integers(len(scenes))], rng))
        told = [_told(describe(scene), rng) for scene in scenes]
        return PairGroup(
            pictures=np.stack([_worn(render(scene, self.resolution), rng) for scene in scenes]),
            captions=[vary(description, rng) for description in told],
            stated=np.stack([_numbers(description) for description in told]),
            shown=np.stack([_numbers(describe(scene)) for scene in scenes]),
            spoilt=spoil(scenes[0], rng, self.resolution)[None],
        )


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs from this one in one thing that a caption may say, drawn afresh elsewhere."""
    changes = [_change_item, _change_item, _change_item, _change_background]
    if len(scene.items) == 2:
        changes += [_change_relation, _change_relation, _swap_attribute, _swap_attribute, _drop_item]
    while True:
        background, items, relation = changes[rng.integers(len(changes))](scene, rng)
        names = (background, [_looks(item) for item in items], relation)
        # Two alike are no scene of this world, and swapping what both have in common changes nothing.
        alike = len(items) == 2 and _looks(items[0]) == _looks(items[1])
        if not alike and names != (scene.background, [_looks(item) for item in scene.items], scene.relation):
            return place(rng, background, items, relation)


Parts = tuple[str, tuple[Item, ...], str | None]


def _looks(item: Item) -> tuple[str, str, str]:
    return item.shape, item.colour, item.size


def _another(rng: np.random.Generator, names: object, current: str | None) -> str:
    return str(rng.choice([name for name in names if name != current]))


def _change_item(scene: Scene, rng: np.random.Generator) -> Parts:
    which, attribute = rng.integers(len(scene.items)), rng.choice(["shape", "colour", "size"])
    names = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[attribute]
    item = scene.items[which]
    changed = replace(item, **{str(attribute): _another(rng, names, getattr(item, attribute))})
    items = tuple(changed if i == which else other for i, other in enumerate(scene.items))
    return scene.background, items, scene.relation


def _change_background(scene: Scene, rng: np.random.Generator) -> Parts:
    return _another(rng, BACKGROUNDS, scene.background), scene.items, scene.relation


def _change_relation(scene: Scene, rng: np.random.Generator) -> Parts:
    return scene.background, scene.items, _another(rng, RELATIONS, scene.relation)


def _swap_attribute(scene: Scene, rng: np.random.Generator) -> Parts:
    """What binds an attribute to its item: red circle, blue star -> blue circle, red star."""
    first, second = scene.items
    name = str(rng.choice(["shape", "colour", "size"]))
    mine, other = getattr(first, name), getattr(second, name)
    return scene.background, (replace(first, **{name: other}), replace(second, **{name: mine})), scene.relation


def _drop_item(scene: Scene, rng: np.random.Generator) -> Parts:
    return scene.background, (scene.items[rng.integers(2)],), None


def _told(description: Description, rng: np.random.Generator) -> Description:
    """Half of all captions say everything; the others leave out a little, half, or nearly all."""
    chance = rng.choice([0.0, 0.0, 0.0, 0.25, 0.5, 0.85])
    return leave_unsaid(description, rng, chance) if chance else description


def _numbers(description: Description) -> np.ndarray:
    """(9,) int64: background, relation, count, then shape, colour, size of each item."""

    def number(names: object, name: str | None) -> int:
        return UNSAID if name is None else list(names).index(name)

    row = [number(BACKGROUNDS, description.background), number(RELATIONS, description.relation)]
    row.append(len(description.items))
    for item in description.items:
        row += [number(SHAPES, item.shape), number(COLOURS, item.colour), number(SIZES, item.size)]
    return np.array(row + [ABSENT] * (9 - len(row)), np.int64)


def fits(stated: Tensor, shown: Tensor) -> Tensor:
    """(n, m) bool: whether caption n is true of picture m. Both (·, 9) as in PairGroup."""
    direct = _all_fit(stated, shown)
    # Told from the other item: relations come in opposite pairs, 0-1 and 2-3.
    relation = shown[:, 1]
    turned = torch.where(relation >= 0, relation ^ 1, relation)
    other = torch.cat([shown[:, :1], turned[:, None], shown[:, 2:3], shown[:, 6:], shown[:, 3:6]], dim=1)
    return direct | _all_fit(stated, other)


def _all_fit(stated: Tensor, shown: Tensor) -> Tensor:
    return ((stated[:, None] == UNSAID) | (stated[:, None] == shown[None])).all(dim=2)


def _worn(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half the pictures a little off, as a decoder leaves them: tinted, noisy, soft. Still what the caption says."""
    if rng.random() < 0.5:
        return picture
    worn = picture.astype(np.float32)
    if rng.random() < 0.5:
        worn = _softened(worn, rng.uniform(0.1, 0.6))
    worn += rng.normal(0, 4, size=3) + rng.normal(0, rng.uniform(0, 8), size=picture.shape)
    return worn.clip(0, 255).astype(np.uint8)


def _softened(picture: np.ndarray, share: float) -> np.ndarray:
    """Mixed with its mean over 3 x 3 pixels."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    side = picture.shape[0]
    mean = sum(padded[dy : dy + side, dx : dx + side] for dy in range(3) for dx in range(3)) / 9
    return picture + np.float32(share) * (mean - picture)


def spoil(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """A picture (S, S, 3) uint8 gone wrong in the ways generators go wrong; no caption of this world fits it."""
    ways = (_chimera, _chimera, _bitten, _scrambled, _scrambled, _two_coloured, _littered, _blurred)
    picture = ways[rng.integers(len(ways))](scene, rng, resolution)
    return _worn(picture.clip(0, 255).astype(np.uint8), rng)


def _chimera(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """One item half one shape and half another, or something between the two."""
    which = int(rng.integers(len(scene.items)))
    item = scene.items[which]
    others = tuple(other for i, other in enumerate(scene.items) if i != which)
    picture = render(replace(scene, items=others), resolution).astype(np.float32)
    mine = coverage(item.shape, item.x, item.y, item.radius, resolution)
    second = coverage(_another(rng, SHAPES, item.shape), item.x, item.y, item.radius, resolution)
    cut = int(resolution * (item.y + rng.uniform(-0.4, 0.4) * item.radius))
    way = rng.integers(4)
    if way == 0:
        mine[cut:] = second[cut:]
    elif way == 1:
        cut = int(resolution * (item.x + rng.uniform(-0.4, 0.4) * item.radius))
        mine[:, cut:] = second[:, cut:]
    elif way == 2:
        mine = (mine + second) / 2
    else:
        mine = abs(mine - second)
    return picture + mine[..., None] * (np.float32(COLOURS[item.colour]) - picture)


def _spots(scene: Scene, rng: np.random.Generator, resolution: int, count: int, side: int) -> list[tuple[int, int]]:
    """Top left corners of blocks that lie on an item."""
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
    """Blocks of the item exchanged, as when single tokens are wrong."""
    picture = render(scene, resolution)
    side = int(rng.choice([resolution // 16, resolution // 16, resolution // 8]))
    spots = _spots(scene, rng, resolution, count=2 * int(rng.integers(2, 7)), side=side)
    for (x, y), (u, v) in zip(spots[::2], spots[1::2], strict=True):
        block = picture[y : y + side, x : x + side].copy()
        picture[y : y + side, x : x + side] = picture[v : v + side, u : u + side]
        picture[v : v + side, u : u + side] = block
    return picture


def _two_coloured(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """One item in two colours."""
    which = int(rng.integers(len(scene.items)))
    item = scene.items[which]
    others = tuple(
        replace(item, colour=_another(rng, COLOURS, item.colour)) if i == which else other
        for i, other in enumerate(scene.items)
    )
    picture, second = render(scene, resolution), render(replace(scene, items=others), resolution)
    cut = int(resolution * (item.y + rng.uniform(-0.5, 0.5) * item.radius))
    picture[cut:] = second[cut:]
    return picture


def _littered(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Specks of colour where nothing should be."""
    picture = render(scene, resolution)
    for _ in range(rng.integers(1, 5)):
        side = int(rng.integers(resolution // 16, resolution // 6))
        x, y = rng.integers(0, resolution - side, size=2)
        picture[y : y + side, x : x + side] = COLOURS[str(rng.choice(list(COLOURS)))]
    return picture


def _blurred(scene: Scene, rng: np.random.Generator, resolution: int) -> np.ndarray:
    small = Image.fromarray(render(scene, resolution)).resize([max(4, resolution // int(rng.integers(5, 12)))] * 2)
    return np.asarray(small.resize((resolution, resolution), Image.Resampling.BICUBIC))
