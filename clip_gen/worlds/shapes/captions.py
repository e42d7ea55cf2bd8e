"""Captions of scenes. A Description is what a caption states; the judge compares pictures with it.

The standard wordings, made of the first word of each list:
    a <size> <colour> <shape> on a <background> background
    a <size> <colour> <shape> <relation> a <size> <colour> <shape> on a <background> background
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from clip_gen.worlds.shapes.scenes import OPPOSITE, Scene


@dataclass(frozen=True)
class ItemDescription:
    """What a caption says about one item; None: nothing."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """What a caption says about a scene; None: nothing. The relation is that of the first item to the second."""

    items: tuple[ItemDescription, ...]
    background: str | None = None
    relation: str | None = None


SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
BACKGROUND_WORDS = {"white": ("white",), "black": ("black",), "gray": ("gray", "grey"), "brown": ("brown",)}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
SETTINGS = (
    "{things} on a {background} background",
    "{things} on {background}",
    "{things}, {background} background",
    "{things} against a {background} background",
    "a {background} background with {things}",
)
OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ", "draw ")
TWO_WORDS = ("two", "2")
NOUNS = ("shape", "shape", "thing", "object")  # for a shape that is left unsaid


def describe(scene: Scene) -> Description:
    """The complete description of a scene."""
    items = tuple(ItemDescription(item.shape, item.colour, item.size) for item in scene.items)
    return Description(items, scene.background, scene.relation)


def leave_unsaid(description: Description, rng: np.random.Generator, chance: float = 0.3) -> Description:
    """Drops each attribute with probability `chance`; the number of items stays."""

    def kept(value: str | None) -> str | None:
        return None if rng.random() < chance else value

    items = tuple(ItemDescription(kept(item.shape), kept(item.colour), kept(item.size)) for item in description.items)
    return Description(items, kept(description.background), kept(description.relation))


def swapped(description: Description) -> Description:
    """The same description with the second item first. With one item it does not change."""
    relation = OPPOSITE[description.relation] if description.relation else None
    return replace(description, items=description.items[::-1], relation=relation)


def caption(description: Description) -> str:
    """The description in the standard wording."""
    return _worded(description, None)


def vary(description: Description, rng: np.random.Generator) -> str:
    """The description in a random wording: random synonyms, order, opening and setting."""
    if len(description.items) == 2 and rng.random() < 0.5:
        description = swapped(description)
    return _pick(rng, OPENINGS) + _worded(description, rng)


def _pick(rng: np.random.Generator | None, words: tuple[str, ...]) -> str:
    return words[0] if rng is None else words[rng.integers(len(words))]


def _worded(description: Description, rng: np.random.Generator | None) -> str:
    things = _things(description, rng)
    if description.background is None:
        return things
    background = _pick(rng, BACKGROUND_WORDS[description.background])
    return _pick(rng, SETTINGS).format(things=things, background=background)


def _things(description: Description, rng: np.random.Generator | None) -> str:
    if len(description.items) == 1:
        return _with_article(_noun_phrase(description.items[0], rng))
    first, second = description.items
    if first == second and description.relation is None:
        number, phrase = _pick(rng, TWO_WORDS), _noun_phrase(first, rng)
        return f"{number} {phrase}{'es' if phrase.endswith('cross') else 's'}"
    phrases = [_with_article(_noun_phrase(item, rng)) for item in description.items]
    relation = _pick(rng, RELATION_WORDS[description.relation]) if description.relation else "and"
    return f" {relation} ".join(phrases)


def _noun_phrase(item: ItemDescription, rng: np.random.Generator | None) -> str:
    size = _pick(rng, SIZE_WORDS[item.size]) if item.size else ""
    noun = item.shape or _pick(rng, NOUNS)
    return " ".join(word for word in (size, item.colour, noun) if word)


def _with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase
