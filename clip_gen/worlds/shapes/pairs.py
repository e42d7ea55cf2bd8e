"""Training data, generated from a seed: pictures with captions for the small CLIP, and pictures without captions.

Random pairs would teach CLIP only easy differences. So its batches have near misses (scenes that differ in one
attribute), and spoilt pictures that no caption fits, since CLIP will rank generated pictures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_gen.worlds.shapes.captions import Description, describe, leave_unsaid, vary
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECT_SIZES,
    RELATIONS,
    SHAPES,
    Item,
    Scene,
    another,
    place,
    sample_scene,
)
from clip_gen.worlds.shapes.spoiling import spoil, wear

TRAINING = 1203  # part of the seed: training pictures differ from those of the command `shapes`
SHORTER = 1  # part of the seed of shorter captions

UNSAID = -1
ABSENT = -2

# The number of possible answers to each question of `answers`.
CHOICES = (len(BACKGROUNDS), 3, *2 * (len(SHAPES), len(COLOURS), len(OBJECT_SIZES)))


def training_rng(seed: int, index: int) -> np.random.Generator:
    """The random generator of training picture `index`; another one than the command `shapes` uses for this seed."""
    return np.random.default_rng([TRAINING, seed, index])


class RenderedPictures(Dataset):
    """Pictures (S, S, 3) uint8 without held-out pairs; picture i depends on the seed and i only."""

    def __init__(self, count: int, seed: int, resolution: int):
        self.count, self.seed, self.resolution = count, seed, resolution

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return render(self.scene(index, training_rng(self.seed, index)), self.resolution)

    def scene(self, index: int, rng: np.random.Generator) -> Scene:
        return sample_scene(rng)


class HardPictures(RenderedPictures):
    """Every second picture has a small star, by far the hardest shape for a VQGAN: its tips are a pixel wide."""

    def scene(self, index: int, rng: np.random.Generator) -> Scene:
        scene = sample_scene(rng)
        while index % 2 and not any((item.shape, item.size) == ("star", "small") for item in scene.items):
            scene = sample_scene(rng)
        return scene


class NearMisses(RenderedPictures):
    """Picture i of RenderedPictures with the shapes or the colours of its two items swapped.

    Pictures with one item, and those whose swaps give held-out pairs, do not change.
    """

    def scene(self, index: int, rng: np.random.Generator) -> Scene:
        scene = sample_scene(rng)
        swaps = [replace(scene, items=_swapped(scene, name)) for name in ("shape", "colour") if len(scene.items) == 2]
        swaps = [swap for swap in swaps if swap != scene and not any(item.held_out for item in swap.items)]
        return swaps[rng.integers(len(swaps))] if swaps else scene


class PairGroup(NamedTuple):
    """A scene and near misses of it, with captions, and a spoilt picture of the scene."""

    pictures: np.ndarray  # (G, S, S, 3) uint8
    captions: list[str]  # G
    stated: np.ndarray  # (G, 9): what each caption says, or UNSAID
    shown: np.ndarray  # (G, 9): what each picture shows
    spoilt: np.ndarray  # (1, S, S, 3) uint8


class CaptionedPairs(Dataset):
    """Groups of captioned pictures; group i depends on the seed and i only."""

    def __init__(self, count: int, seed: int, resolution: int, group: int = 4):
        self.count, self.seed, self.resolution, self.group = count, seed, resolution, group

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> PairGroup:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = training_rng(self.seed, index)
        scenes = [_first_scene(rng)]
        while len(scenes) < self.group:
            scenes.append(near_miss(scenes[rng.integers(len(scenes))], rng))
        descriptions = [_shortened(describe(scene), rng) for scene in scenes]
        return PairGroup(
            pictures=np.stack([wear(render(scene, self.resolution), rng) for scene in scenes]),
            captions=[vary(description, rng) for description in descriptions],
            stated=np.stack([_numbers(description) for description in descriptions]),
            shown=np.stack([_numbers(describe(scene)) for scene in scenes]),
            spoilt=spoil(scenes[0], rng, self.resolution)[None],
        )

    def first(self, index: int) -> tuple[np.ndarray, tuple[str, str]]:
        """The first picture (S, S, 3) uint8 of group `index` without wear, its caption, and a shorter caption."""
        scene = _first_scene(training_rng(self.seed, index))
        rng = np.random.default_rng([TRAINING, self.seed, index, SHORTER])
        shorter = vary(leave_unsaid(describe(scene), rng, rng.choice([0.5, 0.85])), rng)
        return render(scene, self.resolution), (self[index].captions[0], shorter)


def _first_scene(rng: np.random.Generator) -> Scene:
    """Two of three scenes have two items: which attribute belongs to which item is the hardest to learn."""
    return sample_scene(rng, count=int(rng.choice([1, 2, 2])), held_out="may")


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in one thing that a caption may say, at new random places."""
    changes = [_change_item, _change_item, _change_item, _change_background]
    if len(scene.items) == 2:
        changes = [_change_item, _change_item, _change_background, _change_relation, _drop_item]
        changes += 2 * [_change_places] + 4 * [_swap_attribute]
    while True:
        background, items, relation = changes[rng.integers(len(changes))](scene, rng)
        names = (background, [item.look for item in items], relation)
        # Two equal items are not allowed, and swapping equal attributes changes nothing.
        alike = len(items) == 2 and items[0].look == items[1].look
        if not alike and names != (scene.background, [item.look for item in scene.items], scene.relation):
            return place(rng, background, items, relation)


Parts = tuple[str, tuple[Item, ...], str | None]


def _change_item(scene: Scene, rng: np.random.Generator) -> Parts:
    which, attribute = rng.integers(len(scene.items)), rng.choice(["shape", "colour", "size"])
    names = {"shape": SHAPES, "colour": COLOURS, "size": OBJECT_SIZES}[attribute]
    item = scene.items[which]
    changed = replace(item, **{str(attribute): another(rng, names, getattr(item, attribute))})
    items = tuple(changed if i == which else other for i, other in enumerate(scene.items))
    return scene.background, items, scene.relation


def _change_background(scene: Scene, rng: np.random.Generator) -> Parts:
    return another(rng, BACKGROUNDS, scene.background), scene.items, scene.relation


def _change_relation(scene: Scene, rng: np.random.Generator) -> Parts:
    return scene.background, scene.items, another(rng, RELATIONS, scene.relation)


def _change_places(scene: Scene, rng: np.random.Generator) -> Parts:
    return scene.background, scene.items[::-1], scene.relation


def _swap_attribute(scene: Scene, rng: np.random.Generator) -> Parts:
    """Red circle, blue star -> blue circle, red star."""
    return scene.background, _swapped(scene, str(rng.choice(["shape", "colour", "size"]))), scene.relation


def _swapped(scene: Scene, name: str) -> tuple[Item, Item]:
    first, second = scene.items
    mine, other = getattr(first, name), getattr(second, name)
    return replace(first, **{name: other}), replace(second, **{name: mine})


def _drop_item(scene: Scene, rng: np.random.Generator) -> Parts:
    return scene.background, (scene.items[rng.integers(2)],), None


def _shortened(description: Description, rng: np.random.Generator) -> Description:
    """Half of all captions are complete; the others leave out a little, half, or nearly everything."""
    chance = rng.choice([0.0, 0.0, 0.0, 0.25, 0.5, 0.85])
    return leave_unsaid(description, rng, chance) if chance else description


def _numbers(description: Description) -> np.ndarray:
    """(9,) int64: background, relation, count, then shape, colour, size of each item."""

    def number(names: object, name: str | None) -> int:
        return UNSAID if name is None else list(names).index(name)

    row = [number(BACKGROUNDS, description.background), number(RELATIONS, description.relation)]
    row.append(len(description.items))
    for item in description.items:
        row += [number(SHAPES, item.shape), number(COLOURS, item.colour), number(OBJECT_SIZES, item.size)]
    return np.array(row + [ABSENT] * (9 - len(row)), np.int64)


def fits(stated: Tensor, shown: Tensor) -> Tensor:
    """(n, m) bool: whether caption n is true of picture m. Both (·, 9) as in PairGroup."""
    direct = _all_fit(stated, shown)
    # The same scene with the other item first. Relations 0 and 1, and 2 and 3, are opposites.
    relation = shown[:, 1]
    turned = torch.where(relation >= 0, relation ^ 1, relation)
    other = torch.cat([shown[:, :1], turned[:, None], shown[:, 2:3], shown[:, 6:], shown[:, 3:6]], dim=1)
    return direct | _all_fit(stated, other)


def _all_fit(stated: Tensor, shown: Tensor) -> Tensor:
    return ((stated[:, None] == UNSAID) | (stated[:, None] == shown[None])).all(dim=2)


def answers(numbers: Tensor) -> Tensor:
    """What rows (n, 9) as in PairGroup say, independent of the order of items: (n, 8), UNSAID where they say nothing.

    Background, arrangement (alone, side by side, one above the other), then shape, colour and size of the left or upper
    item and of the other one. Without a stated relation the items of two are UNSAID, since their order is unknown.
    """
    relation, items = numbers[:, 1], numbers[:, 3:]
    two = numbers[:, 2] == 2
    turned = two & (relation >= 0) & (relation % 2 == 1)
    items = torch.where(turned[:, None], items.roll(3, dims=1), items)
    items = items.masked_fill((two & (relation < 0))[:, None], UNSAID)
    arrangement = torch.where(two, torch.where(relation < 0, UNSAID, 1 + relation // 2), 0)
    return torch.cat([numbers[:, :1], arrangement[:, None], items], dim=1).clamp(min=UNSAID)
