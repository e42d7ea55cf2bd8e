"""worlds/emoji/captions.py: captions say what the scene shows, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pytest

from clip_gen.worlds.emoji.captions import (
    BACKGROUND_WORDS,
    LAYOUT_WORDS,
    STYLE_WORDS,
    Description,
    ThingDescription,
    caption,
    describe,
    leave_unsaid,
    swapped,
    vary,
)
from clip_gen.worlds.emoji.drawings import COLOURS, STYLES
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, COUNTS, LAYOUTS, RELATIONS, Item, Scene
from clip_gen.worlds.emoji.words import kinds, plural, things

CAT, CAR = ThingDescription("cat"), ThingDescription("automobile", colour="green")


def descriptions(number: int) -> list[Description]:
    """Of random scenes, which need not be visible, with random parts left unsaid."""
    drawn = []
    for i in range(number):
        rng = np.random.default_rng([31, i])
        layout, names = list(LAYOUTS)[i % len(LAYOUTS)], rng.choice(NAMES, 2, replace=False)
        colours = rng.choice([*COLOURS, *3 * [None]], 2)
        items = [Item(str(name), STYLES[i % 3], colour) for name, colour in zip(names, colours, strict=True)]
        if layout not in RELATIONS:
            items = items[:1] * len(LAYOUTS[layout])
        scene = Scene(str(rng.choice(list(BACKGROUNDS))), layout, tuple(items))
        drawn.append(leave_unsaid(describe(scene), rng, rng.choice([0, 0.4, 0.8])))
    return drawn


class Finder:
    """Finds words in a text; of words that overlap, the longest counts."""

    def __init__(self, words: Mapping[str, Iterable[str]]):
        self.names = {word: name for name, all_of in words.items() for word in all_of}
        longest_first = sorted(self.names, key=len, reverse=True)
        self.pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest_first))})(?![\w-])")

    def found(self, text: str) -> tuple[set[str], str]:
        """The names of which a word is in the text, and the text without these words."""
        return {self.names[word] for word in self.pattern.findall(text)}, self.pattern.sub("", text)


# Without an orange, which is a colour too, and a book, of which two are "books".
NAMES = [name for name in things() if name not in ("tangerine", "closed book")]
NOUNS = {name: (*things()[name].nouns, *map(plural, things()[name].nouns)) for name in NAMES}
KINDS = {kind: (kind, plural(kind)) for kind in kinds()}
WORDS_OF_LAYOUTS = {
    layout: {*words, *(" ".join(part for part in word.split() if part not in ("a", "the")) for word in words)}
    for layout, words in LAYOUT_WORDS.items()
}
ALL_COLOURS = {name: BACKGROUND_WORDS.get(name, (name,)) for name in {**BACKGROUNDS, **COLOURS}}


def test_the_standard_wordings() -> None:
    cat, car = Item("cat", "noto", "orange"), Item("automobile", "noto")
    wordings = {
        "large": "a large orange cat on a white background, noto style",
        "top left": "an orange cat in the top left corner on a white background, noto style",
        "three": "three orange cats on a white background, noto style",
    }
    for layout, words in wordings.items():
        assert caption(describe(Scene("white", layout, (cat,) * len(LAYOUTS[layout])))) == words
    related = Scene("light blue", "below", (cat, car))
    assert caption(describe(related)) == "an orange cat below a car on a light blue background, noto style"


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (Description((CAT,)), "a cat"),
        (Description((ThingDescription("scissors", colour="orange"),)), "orange scissors"),
        (Description((ThingDescription(),)), "a thing"),
        (Description((ThingDescription(kind="animal"),), layout="small"), "a small animal"),
        (Description((ThingDescription(kind="food"),), background="orange"), "food on an orange background"),
        (Description((CAT, CAR)), "a cat and a green car"),
        (Description((CAT, ThingDescription(colour="orange")), layout="above"), "a cat above an orange thing"),
        (Description((CAT,), many=True), "cats"),
        (Description((ThingDescription(kind="insect"),), many=True, layout="two"), "two insects"),
        (Description((ThingDescription("pizza"),), many=True, layout="four", style="flat"), "four pizzas, flat style"),
    ],
)
def test_captions_with_unsaid_attributes_are_good_english(description: Description, words: str) -> None:
    assert caption(description) == words


def stated(description: Description) -> dict[str, set[str]]:
    """What a description states, by question."""
    parts = description.things
    return {
        "names": {thing.name for thing in parts} - {None},
        "kinds": {thing.kind for thing in parts} - {None},
        "colours": {*(thing.colour for thing in parts), description.background} - {None},
        "layout": {description.layout} - {None},
        "style": {description.style} - {None},
    }


NOUN_FINDER, *FINDERS = map(Finder, (NOUNS, KINDS, ALL_COLOURS, WORDS_OF_LAYOUTS, STYLE_WORDS))


def read(text: str) -> dict[str, set[str]]:
    """The same, from the words of a caption."""
    names, rest = NOUN_FINDER.found(text)
    read = (finder.found(rest)[0] for finder in FINDERS)
    return {"names": names} | dict(zip(("kinds", "colours", "layout", "style"), read, strict=True))


def test_captions_state_the_description_and_nothing_else() -> None:
    for description in descriptions(400):
        assert read(caption(description)) == stated(description), caption(description)


def test_random_wordings_state_the_same_in_either_order() -> None:
    rng = np.random.default_rng(7)
    for description in descriptions(800):
        words = vary(description, rng)
        assert read(words) in (stated(description), stated(swapped(description))), words


def test_articles_are_correct_in_every_wording() -> None:
    rng = np.random.default_rng(8)
    for description in descriptions(500):
        words = vary(description, rng)
        assert not re.search(r"\ba (?!unicorn)[aeiou]|\ban (?![aeiou]|hourglass)", words), words


def test_the_order_of_two_things_agrees_with_the_relation() -> None:
    rng, description = np.random.default_rng(9), Description((CAT, CAR), layout="left of", background="pink")
    wordings = {vary(description, rng) for _ in range(200)}
    assert len(wordings) > 100
    for words in wordings:
        cat_first = words.index(next(noun for noun in ("kitten", "cat") if noun in words)) < words.index("car")
        assert ("left" in words, "right" in words) == (cat_first, not cat_first)
        assert words.index("green") < words.index("car")
        assert ("cat" in words.partition("green")[2]) != cat_first or "kitten" in words


def test_swapping_the_things_reverses_the_relation() -> None:
    description = Description((CAT, CAR), layout="above", background="white")
    assert swapped(description) == Description((CAR, CAT), layout="below", background="white")
    assert swapped(swapped(description)) == description
    alone = Description((CAT,), layout="top left")
    assert swapped(alone) == alone


def test_leaving_unsaid_gives_kinds_or_nothing_and_keeps_the_number_of_things() -> None:
    rng, full = np.random.default_rng(0), Description((CAT, CAR), layout="above", background="white", style="flat")
    assert leave_unsaid(full, rng, chance=0) == full
    partly = [leave_unsaid(full, rng, chance=0.6) for _ in range(300)]
    for kept in partly:
        assert len(kept.things) == 2
        assert kept.layout in (None, "above")
        assert kept.background in (None, "white")
        assert kept.style in (None, "flat")
        for thing, whole in zip(kept.things, full.things, strict=True):
            assert (thing.name, thing.kind) in {(whole.name, None), (None, None)} | {
                (None, kind) for kind in things()[whole.name].kinds
            }
            assert thing.colour in (None, whole.colour)
    assert {kept.things[0].kind for kept in partly} == {None, "animal", "pet"}
    several = Description((CAT,), many=True, layout="two")
    assert leave_unsaid(several, rng, chance=1).many


def test_a_complete_description_says_all_of_the_scene() -> None:
    items = Item("cat", "flat", "blue"), Item("dog", "flat")
    assert describe(Scene("red", "above", items)) == Description(
        (ThingDescription("cat", colour="blue"), ThingDescription("dog")), False, "above", "red", "flat"
    )
    for layout in COUNTS:
        described = describe(Scene("red", layout, items[:1] * len(LAYOUTS[layout])))
        assert (len(described.things), described.many, described.layout) == (1, True, layout)
