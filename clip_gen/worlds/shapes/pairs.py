"""Pictures with captions for the small CLIP, and pictures alone for everything else. All endless, from a seed.

A CLIP that sees random pairs learns what is easy. So its batches are built of near misses (scenes that differ in one
attribute), and of spoilt pictures that no caption fits, because it will have to rank what a generator draws.
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
    RELATIONS,
    SHAPES,
    SIZES,
    Item,
    Scene,
    another,
    place,
    sample_scene,
)
from clip_gen.worlds.shapes.spoiling import spoil, wear

TRAINING = 1203  # sets the training streams' randomness apart from everybody else's
SHORTER = 1  # and that of a second caption from its group's

UNSAID = -1
ABSENT = -2

# How many answers there are to each question that `answers` gives one to.
CHOICES = (len(BACKGROUNDS), 3, *2 * (len(SHAPES), len(COLOURS), len(SIZES)))


def training_rng(seed: int, index: int) -> np.random.Generator:
    """What draws number `index` of a training stream: never what a folder of pictures of the same seed holds."""
    return np.random.default_rng([TRAINING, seed, index])


class RenderedPictures(Dataset):
    """Picture i of a seed, (S, S, 3) uint8. Held-out pairs never occur."""

    def __init__(self, count: int, seed: int, resolution: int):
        self.count, self.seed, self.resolution = count, seed, resolution

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return render(sample_scene(training_rng(self.seed, index)), self.resolution)


class HardPictures(RenderedPictures):
    """Every second one shows a small star, which a VQGAN draws worst of all by far: its points are a pixel wide."""

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = training_rng(self.seed, index)
        scene = sample_scene(rng)
        while index % 2 and not any((item.shape, item.size) == ("star", "small") for item in scene.items):
            scene = sample_scene(rng)
        return render(scene, self.resolution)


class NearMisses(RenderedPictures):
    """Item i is RenderedPictures' picture i with the shapes or the colours of its two items in each other's place, and
    nothing moved; where there are not two, or no swap is to be had, that picture itself. Held-out pairs never occur.
    """

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = training_rng(self.seed, index)
        scene = sample_scene(rng)
        swaps = [replace(scene, items=_swapped(scene, name)) for name in ("shape", "colour") if len(scene.items) == 2]
        swaps = [swap for swap in swaps if swap != scene and not any(item.held_out for item in swap.items)]
        return render(swaps[rng.integers(len(swaps))] if swaps else scene, self.resolution)


class PairGroup(NamedTuple):
    """Near misses of one scene with their captions, and a spoilt version of the first."""

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
        rng = training_rng(self.seed, index)
        scenes = [_first_scene(rng)]
        while len(scenes) < self.group:
            scenes.append(near_miss(scenes[rng.integers(len(scenes))], rng))
        told = [_told(describe(scene), rng) for scene in scenes]
        return PairGroup(
            pictures=np.stack([wear(render(scene, self.resolution), rng) for scene in scenes]),
            captions=[vary(description, rng) for description in told],
            stated=np.stack([_numbers(description) for description in told]),
            shown=np.stack([_numbers(describe(scene)) for scene in scenes]),
            spoilt=spoil(scenes[0], rng, self.resolution)[None],
        )

    def first(self, index: int) -> tuple[np.ndarray, tuple[str, str]]:
        """The picture (S, S, 3) uint8 that group `index` begins with, as it was before it wore, its caption, and
        another that leaves out half or nearly all.
        """
        scene = _first_scene(training_rng(self.seed, index))
        rng = np.random.default_rng([TRAINING, self.seed, index, SHORTER])
        shorter = vary(leave_unsaid(describe(scene), rng, rng.choice([0.5, 0.85])), rng)
        return render(scene, self.resolution), (self[index].captions[0], shorter)


def _first_scene(rng: np.random.Generator) -> Scene:
    """Two scenes of three have two items: what belongs to which is the hardest to learn."""
    return sample_scene(rng, count=int(rng.choice([1, 2, 2])), held_out="may")


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs from this one in one thing that a caption may say, drawn afresh elsewhere."""
    changes = [_change_item, _change_item, _change_item, _change_background]
    if len(scene.items) == 2:
        changes = [_change_item, _change_item, _change_background, _change_relation, _drop_item]
        changes += 2 * [_change_places] + 4 * [_swap_attribute]
    while True:
        background, items, relation = changes[rng.integers(len(changes))](scene, rng)
        names = (background, [item.look for item in items], relation)
        # Two alike are no scene of this world, and swapping what both have in common changes nothing.
        alike = len(items) == 2 and items[0].look == items[1].look
        if not alike and names != (scene.background, [item.look for item in scene.items], scene.relation):
            return place(rng, background, items, relation)


Parts = tuple[str, tuple[Item, ...], str | None]


def _change_item(scene: Scene, rng: np.random.Generator) -> Parts:
    which, attribute = rng.integers(len(scene.items)), rng.choice(["shape", "colour", "size"])
    names = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[attribute]
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
    """What binds an attribute to its item: red circle, blue star -> blue circle, red star."""
    return scene.background, _swapped(scene, str(rng.choice(["shape", "colour", "size"]))), scene.relation


def _swapped(scene: Scene, name: str) -> tuple[Item, Item]:
    first, second = scene.items
    mine, other = getattr(first, name), getattr(second, name)
    return replace(first, **{name: other}), replace(second, **{name: mine})


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


def answers(numbers: Tensor) -> Tensor:
    """(n, 8) what rows (n, 9) as in PairGroup say, each scene told in one order; UNSAID where they do not.

    Background, arrangement (alone, side by side, one above the other), then shape, colour and size of the item on the
    left or above and of the other. How two stand must be said to tell which is which.
    """
    relation, items = numbers[:, 1], numbers[:, 3:]
    two = numbers[:, 2] == 2
    turned = two & (relation >= 0) & (relation % 2 == 1)
    items = torch.where(turned[:, None], items.roll(3, dims=1), items)
    items = items.masked_fill((two & (relation < 0))[:, None], UNSAID)
    arrangement = torch.where(two, torch.where(relation < 0, UNSAID, 1 + relation // 2), 0)
    return torch.cat([numbers[:, :1], arrangement[:, None], items], dim=1).clamp(min=UNSAID)
