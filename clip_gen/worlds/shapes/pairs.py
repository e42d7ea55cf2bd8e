"""Training data, generated from a seed: pictures with captions for the small CLIP, and pictures without captions.

Random pairs would teach CLIP only easy differences. So its batches have near misses (scenes that differ in one
attribute), and spoilt pictures that no caption fits, since CLIP will rank generated pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clip_gen.worlds.clip_trainer import UNSAID
from clip_gen.worlds.pairs import GROUP, PairGroup, SeededPictures
from clip_gen.worlds.shapes.captions import Description, caption, describe, leave_unsaid, swapped, vary
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECT_SIZES,
    RELATIONS,
    SHAPES,
    Scene,
    another,
    place,
    sample_scene,
)
from clip_gen.worlds.shapes.spoiling import spoil
from clip_gen.worlds.spoiling import wear

ABSENT = -2  # an attribute of the second item, where there is none
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": OBJECT_SIZES}

# The changes that make a near miss of a scene with so many items; some are more likely than others.
CHANGES = {
    1: ("item", "item", "item", "background"),
    2: ("item", "item", "background", "relation", "drop", *2 * ("exchange",), *4 * ("swap",)),
}

# The number of possible answers to each question of `answers`.
CHOICES = (len(BACKGROUNDS), 3, *2 * (len(SHAPES), len(COLOURS), len(OBJECT_SIZES)))


class RenderedPictures(SeededPictures):
    """Pictures (S, S, 3) uint8 without held-out pairs."""

    def __getitem__(self, index: int) -> np.ndarray:
        return render(self.scene(index, self.rng(index)), self.resolution)

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
        if len(scene.items) == 1:
            return scene
        swaps = [swapped_attribute(scene, name) for name in ("shape", "colour")]
        swaps = [swap for swap in swaps if swap != scene and not any(item.held_out for item in swap.items)]
        return swaps[rng.integers(len(swaps))] if swaps else scene


class CaptionedPictures(RenderedPictures):
    """Item i: a picture (S, S, 3) uint8 with any pairs of colour and shape, its caption, and a shorter caption."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[str, str]]:
        rng = self.rng(index)
        scene = self.scene(index, rng)
        caption = vary(_shortened(describe(scene), rng), rng)
        shorter = vary(leave_unsaid(describe(scene), rng, rng.choice([0.5, 0.85])), rng)
        return render(scene, self.resolution), (caption, shorter)

    def scene(self, index: int, rng: np.random.Generator) -> Scene:
        """Two of three scenes have two items: which attribute belongs to which item is the hardest to learn."""
        return sample_scene(rng, count=int(rng.choice([1, 2, 2])), held_out="may")


class CaptionedPairs(CaptionedPictures):
    """Groups of captioned pictures."""

    def __getitem__(self, index: int) -> PairGroup:
        rng = self.rng(index)
        scenes = [self.scene(index, rng)]
        while len(scenes) < GROUP:
            scenes.append(near_miss(scenes[rng.integers(len(scenes))], rng))
        stated = [_shortened(describe(scene), rng) for scene in scenes]
        pictures = np.stack([wear(render(scene, self.resolution), rng) for scene in scenes])
        captions = [vary(description, rng) for description in stated]
        spoilt = spoil(scenes[0], rng, self.resolution)[None]
        return PairGroup(pictures, captions, stated, [describe(scene) for scene in scenes], spoilt)


def sampled_caption(rng: np.random.Generator) -> str:
    """The standard caption of a random scene."""
    return caption(describe(sample_scene(rng)))


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in one thing that a caption may say, at new random places."""
    kinds = CHANGES[len(scene.items)]
    while True:
        changed = _changed(scene, kinds[rng.integers(len(kinds))], rng)
        looks = {item.look for item in changed.items}
        # Two equal items are not allowed, and swapping equal attributes changes nothing.
        if len(looks) == len(changed.items) and changed != scene:
            return place(changed, rng)


def _changed(scene: Scene, kind: str, rng: np.random.Generator) -> Scene:
    match kind:
        case "item":
            number, attribute = rng.integers(len(scene.items)), str(rng.choice(list(ATTRIBUTES)))
            item, names = scene.items[number], ATTRIBUTES[attribute]
            return scene.with_item(number, replace(item, **{attribute: another(rng, names, getattr(item, attribute))}))
        case "background":
            return replace(scene, background=another(rng, BACKGROUNDS, scene.background))
        case "relation":
            return replace(scene, relation=another(rng, RELATIONS, scene.relation))
        case "drop":
            return replace(scene, items=(scene.items[rng.integers(2)],), relation=None)
        case "exchange":
            return replace(scene, items=scene.items[::-1])
        case _:
            return swapped_attribute(scene, str(rng.choice(list(ATTRIBUTES))))


def swapped_attribute(scene: Scene, name: str) -> Scene:
    """The scene of two items with one attribute swapped: red circle, blue star -> blue circle, red star."""
    first, second = scene.items
    items = replace(first, **{name: getattr(second, name)}), replace(second, **{name: getattr(first, name)})
    return replace(scene, items=items)


def _shortened(description: Description, rng: np.random.Generator) -> Description:
    """Half of all captions are complete; the others leave out a little, half, or nearly everything."""
    chance = rng.choice([0.0, 0.0, 0.0, 0.25, 0.5, 0.85])
    return leave_unsaid(description, rng, chance) if chance else description


def numbers(description: Description) -> list[int]:
    """Background, relation, count, then shape, colour and size of two items: nine numbers, UNSAID or ABSENT if none."""

    def number(names: Iterable[str], name: str | None) -> int:
        return UNSAID if name is None else list(names).index(name)

    background, relation = number(BACKGROUNDS, description.background), number(RELATIONS, description.relation)
    items = [number(names, getattr(item, name)) for item in description.items for name, names in ATTRIBUTES.items()]
    return [background, relation, len(description.items), *items, *[ABSENT] * (6 - len(items))]


def fits(stated: list[Description], shown: list[Description]) -> Tensor:
    """(n, m) bool: whether caption n is true of picture m, in either order of its items."""
    wanted = torch.tensor([numbers(description) for description in stated])[:, None, None]
    given = torch.tensor([[numbers(description), numbers(swapped(description))] for description in shown])
    return ((wanted == UNSAID) | (wanted == given)).all(dim=3).any(dim=2)


def answers(description: Description) -> list[int]:
    """Eight answers that do not depend on the order of the items; UNSAID where there is none.

    Background, arrangement (alone, side by side, one above the other), then shape, colour and size of the left or upper
    item and of the other one. Without a stated relation the order of two items is unknown, so they give no answers.
    """
    if description.relation in ("right of", "below"):
        description = swapped(description)
    background, relation, count, *items = numbers(description)
    if count == 2 and relation == UNSAID:
        return [background, *7 * [UNSAID]]
    arrangement = 0 if count == 1 else 1 + relation // 2
    return [background, arrangement, *(UNSAID if item == ABSENT else item for item in items)]
