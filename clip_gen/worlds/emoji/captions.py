"""Captions of scenes. A Description is what a caption states; the judge compares pictures with it.

The standard wordings, made of the first word of each list:
    a large <colour> <thing> on a <background> background, <style> style
    a <colour> <thing> in the top left corner on a <background> background, <style> style
    a <colour> <thing> left of a <colour> <thing> on a <background> background, <style> style
    three <colour> <things> on a <background> background, <style> style
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from clip_gen.worlds.emoji.scenes import COUNTS, OPPOSITE, SIZES, Scene
from clip_gen.worlds.emoji.words import plural, things, with_article

LAYOUT_WORDS = {
    "large": ("large", "big", "huge"),
    "small": ("small", "little", "tiny"),
    "top left": ("in the top left corner", "at the top left", "in the upper left corner"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right corner"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "two": ("two", "2", "a pair of"),
    "three": ("three", "3"),
    "four": ("four", "4"),
}
BACKGROUND_WORDS = {"gray": ("gray", "grey"), "light blue": ("light blue", "sky blue")}
STYLE_WORDS = {"noto": ("noto", "google"), "flat": ("flat", "twemoji"), "3d": ("3d", "fluent")}
SETTINGS = (
    "{things} on {a_background} background",
    "{things} on {background}",
    "{things}, {background} background",
    "{things} against {a_background} background",
    "{a_background} background with {things}",
)
STYLED = (
    "{scene}, {style} style",
    "{scene} in {style} style",
    "a {style} drawing of {scene}",
    "a {style} emoji of {scene}",
)
STYLE_AS_ADJECTIVE = 0.3  # share of the captions of one thing with a style: "a flat cat"
OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "an emoji of ", "draw ")
NOUNS = ("thing", "object")  # for a thing that is left unsaid


@dataclass(frozen=True)
class ThingDescription:
    """What a caption says about a thing; None: nothing. kind: "animal" and the like, instead of a name."""

    name: str | None = None
    kind: str | None = None
    colour: str | None = None


@dataclass(frozen=True)
class Description:
    """What a caption says about a scene; None: nothing. many: whether it has two to four of the one thing."""

    things: tuple[ThingDescription, ...]
    many: bool = False
    layout: str | None = None
    background: str | None = None
    style: str | None = None


def describe(scene: Scene) -> Description:
    """The complete description of a scene."""
    many = scene.layout in COUNTS
    items = scene.items[:1] if many else scene.items
    described = tuple(ThingDescription(item.name, colour=item.colour) for item in items)
    return Description(described, many, scene.layout, scene.background, scene.items[0].style)


def leave_unsaid(description: Description, rng: np.random.Generator, chance: float = 0.3) -> Description:
    """Drops each attribute with probability `chance`. Half of the dropped names become kinds."""

    def kept(value: str | None) -> str | None:
        return None if rng.random() < chance else value

    def shortened(thing: ThingDescription) -> ThingDescription:
        short = ThingDescription(kept(thing.name), colour=kept(thing.colour))
        kinds = things()[thing.name].kinds if thing.name and not short.name else ()
        return replace(short, kind=kinds[rng.integers(len(kinds))]) if kinds and rng.random() < 0.5 else short

    return Description(
        tuple(shortened(thing) for thing in description.things),
        description.many,
        *map(kept, (description.layout, description.background, description.style)),
    )


def swapped(description: Description) -> Description:
    """The same description with the second thing first. With one thing it does not change."""
    layout = OPPOSITE.get(description.layout, description.layout)
    return replace(description, things=description.things[::-1], layout=layout)


def caption(description: Description) -> str:
    """The description in the standard wording."""
    return _worded(description, None)


def vary(description: Description, rng: np.random.Generator) -> str:
    """The description in a random wording: random nouns, order, opening and setting, sometimes without articles."""
    if len(description.things) == 2 and rng.random() < 0.5:
        description = swapped(description)
    text = _worded(description, rng)
    if description.style is None:
        text = _pick(rng, OPENINGS) + text
    if rng.random() < 0.15:
        return " ".join(word for word in text.split() if word not in ("a", "an", "the"))
    return text


def _pick(rng: np.random.Generator | None, words: tuple[str, ...]) -> str:
    return words[0] if rng is None else words[rng.integers(len(words))]


def _worded(description: Description, rng: np.random.Generator | None) -> str:
    style = _pick(rng, STYLE_WORDS[description.style]) if description.style else ""
    single = len(description.things) == 1 and not description.many
    adjective = bool(style and rng and single and rng.random() < STYLE_AS_ADJECTIVE)
    text = _things(description, style if adjective else "", rng)
    if description.background is not None:
        words = BACKGROUND_WORDS.get(description.background, (description.background,))
        background = _pick(rng, words)
        with_a = with_article(background, background)
        text = _pick(rng, SETTINGS).format(things=text, background=background, a_background=with_a)
    return _pick(rng, STYLED).format(scene=text, style=style) if style and not adjective else text


def _things(description: Description, style: str, rng: np.random.Generator | None) -> str:
    layout = description.layout
    words = "" if layout is None else _pick(rng, LAYOUT_WORDS[layout])
    if len(description.things) == 2:
        return f" {words or 'and'} ".join(_one(thing, "", "", rng) for thing in description.things)
    thing = description.things[0]
    if description.many:
        return _joined(words, thing.colour, plural(_noun(thing, rng)))
    if layout is None or layout in SIZES:
        return _one(thing, words, style, rng)
    return f"{_one(thing, '', style, rng)} {words}"


def _one(thing: ThingDescription, size: str, style: str, rng: np.random.Generator | None) -> str:
    noun = _noun(thing, rng)
    return with_article(_joined(size, style, thing.colour, noun), noun)


def _noun(thing: ThingDescription, rng: np.random.Generator | None) -> str:
    return _pick(rng, things()[thing.name].nouns) if thing.name else thing.kind or _pick(rng, NOUNS)


def _joined(*words: str | None) -> str:
    return " ".join(word for word in words if word)
