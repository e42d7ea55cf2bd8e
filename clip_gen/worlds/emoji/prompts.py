"""Fixed prompts to evaluate an emoji model. Prompt i of a kind depends only on the seed, the kind and i."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from clip_gen.worlds.emoji.captions import Description, ThingDescription, caption
from clip_gen.worlds.emoji.drawings import COLOURS, STYLES, dominant_hue
from clip_gen.worlds.emoji.sampling import is_clear, one_of
from clip_gen.worlds.emoji.scenes import (
    BACKGROUNDS,
    CORNERS,
    COUNTS,
    OPPOSITE,
    RELATIONS,
    Item,
    Scene,
    held_out,
    held_out_by,
    with_items,
)
from clip_gen.worlds.emoji.words import things
from clip_gen.worlds.judged import Case

TITLES = {
    "one": "one thing on a background",
    "two": "two things with a relation",
    "counts": "two to four of a thing",
    "coloured": "a thing in a colour",
    "positions": "a thing in a corner",
    "styled": "a thing in a style",
    "unsaid": "a kind of thing, or no background",
    "synonyms": "a synonym that no caption uses",
    "held_out_backgrounds": "a thing on a held-out background",
    "held_out_colours": "a thing in a held-out colour",
    "held_out_styles": "a thing in a held-out style",
    "held_out_relations": "two things with a held-out relation",
    "two_unsaid": "two things with a relation, no background said",
}
KINDS = tuple(TITLES)
HELD_OUT = tuple(f"held_out_{name}" for name in ("backgrounds", "colours", "styles", "relations"))
LAYOUTS_OF = {
    **dict.fromkeys(("two", "two_unsaid", "held_out_relations"), RELATIONS),
    "counts": COUNTS,
    "positions": CORNERS,
}


def cases(kind: str, count: int, seed: int) -> list[Case]:
    """`count` cases of a kind, one of TITLES. Only those of the held-out kinds have held-out combinations."""
    return [_case(kind, np.random.default_rng([seed, KINDS.index(kind), i])) for i in range(count)]


def _case(kind: str, rng: np.random.Generator) -> Case:
    scene = _scene(kind, rng)
    while not _fits(scene, kind):
        scene = _scene(kind, rng)
    return _said(kind, scene, rng)


def _scene(kind: str, rng: np.random.Generator) -> Scene:
    """A random scene for a kind; colours may be impossible and things invisible."""
    layout, background, style = (
        one_of(rng, names) for names in (LAYOUTS_OF.get(kind, ("large",)), BACKGROUNDS, STYLES)
    )
    first, second = (one_of(rng, _names(kind)) for _ in range(2))
    colour = one_of(rng, COLOURS) if kind == "coloured" else None
    if kind in HELD_OUT:
        combination = _combinations(kind)[rng.integers(len(_combinations(kind)))]
        match kind.removeprefix("held_out_"), combination:
            case "backgrounds", (first, background):
                pass
            case "colours", (first, colour):
                pass
            case "styles", (first, style):
                pass
            case _, (first, layout, second):
                if rng.random() < 0.5:
                    first, layout, second = second, OPPOSITE[layout], first
    items = (Item(first, style, colour), Item(second, style))
    return with_items(Scene(background, layout, ()), *items[: 2 if layout in RELATIONS else 1])


@cache
def _names(kind: str) -> tuple[str, ...]:
    has = {"synonyms": "unseen", "unsaid": "kinds"}.get(kind, "nouns")
    return tuple(name for name, thing in things().items() if getattr(thing, has))


@cache
def _combinations(kind: str) -> list[tuple[str, ...]]:
    return sorted(held_out()[kind.removeprefix("held_out_")])


def _fits(scene: Scene, kind: str) -> bool:
    """Whether the scene can be drawn, and has held-out combinations of its kind only."""
    possible = all(item.colour is None or dominant_hue(item.name, item.style) is not None for item in scene.items)
    return possible and is_clear(scene) and held_out_by(scene) == tuple(kind == name for name in HELD_OUT)


def _said(kind: str, scene: Scene, rng: np.random.Generator) -> Case:
    """A prompt says of a scene what its kind is about, and the background; of the scenes of "unsaid" less."""
    items = scene.items if scene.layout in RELATIONS else scene.items[:1]
    described = tuple(ThingDescription(item.name, colour=item.colour) for item in items)
    layout = scene.layout if kind in LAYOUTS_OF else None
    style = scene.items[0].style if kind in ("styled", "held_out_styles") else None
    description = Description(described, kind == "counts", layout, scene.background, style)
    if kind == "synonyms":
        noun = ThingDescription(kind=one_of(rng, things()[items[0].name].unseen))
        return Case(caption(replace(description, things=(noun,))), description, scene)
    if kind == "two_unsaid":
        description = replace(description, background=None)
    if kind == "unsaid":
        described, background = _less(items[0].name, scene.background, rng)
        description = replace(description, things=(described,), background=background)
    return Case(caption(description), description, scene)


def _less(name: str, background: str, rng: np.random.Generator) -> tuple[ThingDescription, str | None]:
    """A kind instead of a name, with or without the background; or a name alone."""
    what = rng.integers(3)
    thing = ThingDescription(name) if what == 0 else ThingDescription(kind=one_of(rng, things()[name].kinds))
    return thing, background if what == 1 else None
