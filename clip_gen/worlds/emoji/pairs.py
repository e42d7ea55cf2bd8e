"""Training data, generated from a seed: pictures with captions for the small CLIP, and pictures without captions.

As in the shapes world, CLIP's batches have near misses, which differ in one attribute, and spoilt pictures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clip_gen.worlds.clip_trainer import UNSAID
from clip_gen.worlds.emoji.captions import Description, caption, describe, leave_unsaid, swapped, vary
from clip_gen.worlds.emoji.drawings import COLOURS, STYLES, dominant_hue
from clip_gen.worlds.emoji.related_nouns import related_nouns
from clip_gen.worlds.emoji.rendering import render
from clip_gen.worlds.emoji.sampling import (
    HARD_RECOLOURED,
    HARD_SHARES,
    another,
    is_clear,
    one_of,
    sample_item,
    sample_scene,
)
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, COUNTS, LAYOUTS, RELATIONS, Scene, with_items
from clip_gen.worlds.emoji.spoiling import spoil
from clip_gen.worlds.emoji.words import kinds, things
from clip_gen.worlds.pairs import GROUP, PairGroup, SeededPictures
from clip_gen.worlds.spoiling import wear

NAMES = tuple(things())
NATURAL = len(COLOURS)  # the answer for a drawing in the artist's colours, which no caption gives
PAIRS = 0.45  # share of CLIP's scenes that have two things with a relation

# The questions that `answers` answers, with the number of possible answers: background, layout, style, and name and
# colour of the first and the second thing.
CHOICES = (len(BACKGROUNDS), len(LAYOUTS), len(STYLES), *2 * (len(NAMES), len(COLOURS) + 1))

# The changes that make a near miss of a scene with so many different items; some are more likely than others.
CHANGES = {
    1: ("name", "name", "kind", "style", "colour", "colour", "background", "layout"),
    2: ("name", "kind", "colour", "background", "relation", "exchange", *2 * ("swap names", "swap colours")),
}


class RenderedPictures(SeededPictures):
    """Pictures (S, S, 3) uint8 without held-out combinations."""

    def __getitem__(self, index: int) -> np.ndarray:
        return render(self.scene(self.rng(index)), self.resolution)

    def scene(self, rng: np.random.Generator) -> Scene:
        return sample_scene(rng)


class HardPictures(RenderedPictures):
    """Like RenderedPictures, with more small and more recoloured drawings, and more that have company."""

    def scene(self, rng: np.random.Generator) -> Scene:
        return sample_scene(rng, shares=HARD_SHARES, recoloured=HARD_RECOLOURED)


class NearMisses(RenderedPictures):
    """Picture i of RenderedPictures with the two things exchanged, or with their colours swapped.

    Pictures with one item, and those whose swaps give held-out combinations, do not change.
    """

    def scene(self, rng: np.random.Generator) -> Scene:
        scene = sample_scene(rng)
        if scene.layout not in RELATIONS:
            return scene
        swaps = [_changed(scene, kind, rng) for kind in ("exchange", "swap colours")]
        swaps = [swap for swap in swaps if swap != scene and is_clear(swap) and not swap.held_out]
        return swaps[rng.integers(len(swaps))] if swaps else scene


class CaptionedPictures(SeededPictures):
    """Item i: a picture (S, S, 3) uint8 with any combinations, its caption, and a shorter caption."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[str, str]]:
        rng = self.rng(index)
        scene = self.scene(rng)
        return render(scene, self.resolution), _captions_of(scene, rng)

    def scene(self, rng: np.random.Generator) -> Scene:
        layout = one_of(rng, RELATIONS) if rng.random() < PAIRS else None
        return sample_scene(rng, layout=layout, held_out="may")


class CaptionedPairs(CaptionedPictures):
    """Groups of captioned pictures."""

    def __getitem__(self, index: int) -> PairGroup:
        rng = self.rng(index)
        scenes = [self.scene(rng)]
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


def captions(pictures: RenderedPictures, number: int) -> tuple[str, str]:
    """A caption and a shorter caption of one of the pictures."""
    rng = pictures.rng(number)
    return _captions_of(pictures.scene(rng), rng)


def _captions_of(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    text = vary(_shortened(describe(scene), rng), rng)
    return text, vary(leave_unsaid(describe(scene), rng, rng.choice([0.5, 0.85])), rng)


def synonym_captions(rng: np.random.Generator) -> tuple[str, str]:
    """A caption with a word of related_nouns, and the same caption with the noun that it resembles."""
    word = one_of(rng, related_nouns())
    description = leave_unsaid(describe(sample_scene(rng)), rng)
    seed = rng.integers(2**32)
    texts = []
    for noun in (word, related_nouns()[word]):
        first = replace(description.things[0], name=None, kind=noun)
        texts.append(vary(replace(description, things=(first, *description.things[1:])), np.random.default_rng(seed)))
    return texts[0], texts[1]


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in one attribute that a caption may state."""
    changes = CHANGES[len(set(scene.items))]
    while True:
        changed = _changed(scene, changes[rng.integers(len(changes))], rng)
        if changed != scene and is_clear(changed):
            return changed


def _changed(scene: Scene, change: str, rng: np.random.Generator) -> Scene:
    items = list(scene.items[:1] if scene.layout in COUNTS else scene.items)
    which = int(rng.integers(len(items)))
    item = items[which]
    match change:
        case "name":
            items[which] = sample_item(rng, item.style)
        case "kind":  # another thing of the same kind, in the same colour if possible
            same = [name for kind in things()[item.name].kinds for name in kinds()[kind]]
            name = another(rng, same, item.name) if len(set(same)) > 1 else item.name
            kept = item.colour and dominant_hue(name, item.style) is not None
            items[which] = replace(item, name=name, colour=item.colour if kept else None)
        case "colour" if dominant_hue(item.name, item.style) is not None:
            items[which] = replace(item, colour=another(rng, COLOURS, item.colour))
        case "style":
            return _in_style(scene, another(rng, STYLES, item.style))
        case "background":
            return replace(scene, background=another(rng, BACKGROUNDS, scene.background))
        case "layout":
            layouts = [layout for layout in LAYOUTS if layout not in RELATIONS]
            layout = another(rng, layouts, scene.layout)
            return Scene(scene.background, layout, (item,) * len(LAYOUTS[layout]))
        case "relation":
            return replace(scene, layout=another(rng, RELATIONS, scene.layout))
        case "exchange":
            return replace(scene, items=scene.items[::-1])
        case "swap names" | "swap colours":
            return _swapped(scene, change.removeprefix("swap ").removesuffix("s"))
    return with_items(scene, *items)


def _in_style(scene: Scene, style: str) -> Scene:
    """The scene in another style. Items that have no dominant hue there get the artist's colours."""
    items = (
        replace(item, style=style, colour=item.colour if dominant_hue(item.name, style) is not None else None)
        for item in scene.items
    )
    return replace(scene, items=tuple(items))


def _swapped(scene: Scene, field: str) -> Scene:
    """The scene of two items with names or colours swapped; the same scene if a drawing cannot take the colour."""
    first, second = scene.items
    items = replace(first, **{field: getattr(second, field)}), replace(second, **{field: getattr(first, field)})
    possible = all(item.colour is None or dominant_hue(item.name, item.style) is not None for item in items)
    return replace(scene, items=items) if possible else scene


def _shortened(description: Description, rng: np.random.Generator) -> Description:
    """Half of all captions leave nothing out but the style; half of all captions leave out the style."""
    chance = rng.choice([0.0, 0.0, 0.0, 0.25, 0.5, 0.85])
    shorter = leave_unsaid(description, rng, chance) if chance else description
    return replace(shorter, style=None) if rng.random() < 0.5 else shorter


def answers(description: Description) -> list[int]:
    """The answers to the questions of CHOICES, independent of the order of two things; UNSAID where there is none.

    Without a stated relation the order of two things is unknown, so they give no answers.
    """
    if description.layout in ("right of", "below"):
        description = swapped(description)
    values = [
        _number(BACKGROUNDS, description.background),
        _number(LAYOUTS, description.layout),
        _number(STYLES, description.style),
    ]
    known = description.things if len(description.things) == 1 or description.layout else ()
    for thing in known:
        values += [_number(NAMES, thing.name), _number(COLOURS, thing.colour)]
    return values + [UNSAID] * (len(CHOICES) - len(values))


def shown_answers(description: Description) -> list[int]:
    """`answers` for the complete description of a picture, where a thing without a colour has the artist's."""
    values = answers(description)
    for place in (4, 6):
        if values[place - 1] != UNSAID and values[place] == UNSAID:
            values[place] = NATURAL
    return values


def _number(names: object, name: str | None) -> int:
    return UNSAID if name is None else list(names).index(name)


def fits(stated: list[Description], shown: list[Description]) -> Tensor:
    """(n, m) bool: whether caption n is true of picture m, in either order of its things."""
    allowed = np.stack([_allowed(description) for description in stated])  # (n, A): the answers that a caption allows
    starts = np.cumsum([0, *_SIZES[:-1]])
    right = np.zeros((len(stated), len(shown)), bool)
    for turned in (shown, [swapped(description) for description in shown]):
        numbers = starts + np.array([_facts(description) for description in turned])  # (m, Q)
        right |= allowed[:, numbers].all(axis=2)
    return torch.from_numpy(right)


_SIZES = (len(BACKGROUNDS), len(LAYOUTS), len(STYLES), *2 * (len(NAMES) + 1, len(COLOURS) + 1))  # + 1: no second thing


def _facts(description: Description) -> list[int]:
    """The numbers of what a complete description says, with len(NAMES) for a thing that is not there."""
    facts = [
        _number(BACKGROUNDS, description.background),
        _number(LAYOUTS, description.layout),
        _number(STYLES, description.style),
    ]
    for thing in description.things:
        facts += [_number(NAMES, thing.name), NATURAL if thing.colour is None else _number(COLOURS, thing.colour)]
    return facts + [len(NAMES), NATURAL] * (2 - len(description.things))


def _allowed(description: Description) -> np.ndarray:
    """(A,) bool: which answers fit a description, for the questions of _SIZES one after the other."""
    parts = [np.ones(size, bool) for size in _SIZES]
    for part, names, name in (
        (0, BACKGROUNDS, description.background),
        (1, LAYOUTS, description.layout),
        (2, STYLES, description.style),
    ):
        if name is not None:
            parts[part] = np.array([other == name for other in names])
    if description.layout is None:
        wanted = COUNTS if description.many else RELATIONS if len(description.things) == 2 else ()
        parts[1] = np.array([layout in wanted if wanted else len(LAYOUTS[layout]) == 1 for layout in LAYOUTS])
    for number in range(2):
        names, colours = parts[3 + 2 * number], parts[4 + 2 * number]
        if number == len(description.things):
            names[:-1] = False
            continue
        thing = description.things[number]
        names[-1] = False
        if thing.name:
            names[:-1] = [name == thing.name for name in NAMES]
        elif thing.kind:
            names[:-1] = [name in kinds()[thing.kind] for name in NAMES]
        if thing.colour:
            colours[:] = [name == thing.colour for name in (*COLOURS, None)]
    return np.concatenate(parts)
