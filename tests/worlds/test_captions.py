"""worlds/shapes/captions.py: the standard wording and random ones say what the scene shows, and nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from clip_gen.worlds.shapes.captions import (
    BACKGROUND_WORDS,
    RELATION_WORDS,
    SIZE_WORDS,
    Description,
    ItemDescription,
    caption,
    describe,
    leave_unsaid,
    swapped,
    vary,
)
from clip_gen.worlds.shapes.scenes import COLOURS, SHAPES, Item, Scene, sample_scene

CIRCLE = ItemDescription("circle", "red", "large")
CROSS = ItemDescription("cross", "orange", "small")


def found(words: dict[str, tuple[str, ...]], text: str) -> str | None:
    """The one name of which a word is in the text; of two words that overlap, the longer counts."""
    pairs = sorted(((word, name) for name, all_of in words.items() for word in all_of), key=lambda p: -len(p[0]))
    return next((name for word, name in pairs if re.search(rf"\b{word}\b", text)), None)


def parsed_item(text: str) -> ItemDescription:
    shapes = {shape: (shape, f"{shape}s", f"{shape}es") for shape in SHAPES}
    colours = {colour: (colour,) for colour in COLOURS}
    return ItemDescription(found(shapes, text), found(colours, text), found(SIZE_WORDS, text))


def parsed(text: str) -> Description:
    """The description that a caption states, parsed by the words in it."""
    background = found(BACKGROUND_WORDS, text)
    relation = found(RELATION_WORDS, text)
    if relation:
        word = max((word for word in RELATION_WORDS[relation] if f" {word} " in text), key=len)
        items = tuple(map(parsed_item, text.split(f" {word} ")))
    elif re.search(r"\b(two|2)\b", text):
        items = (parsed_item(text),) * 2
    else:
        items = tuple(map(parsed_item, text.split(" and ")))
    return Description(items, background, relation)


def descriptions(number: int) -> list[Description]:
    drawn = []
    for i in range(number):
        rng = np.random.default_rng([31, i])
        drawn.append(leave_unsaid(describe(sample_scene(rng, held_out="may")), rng, chance=rng.choice([0, 0.4, 0.8])))
    return drawn


def test_the_two_standard_wordings():
    one = Scene("white", (Item("circle", "red", "large"),))
    assert caption(describe(one)) == "a large red circle on a white background"
    two = Scene("gray", (Item("star", "blue", "small"), Item("cross", "pink", "large")), "left of")
    assert caption(describe(two)) == "a small blue star left of a large pink cross on a gray background"


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (Description((ItemDescription("circle", "orange"),)), "an orange circle"),
        (Description((CROSS,), "black"), "a small orange cross on a black background"),
        (Description((ItemDescription(size="large"),)), "a large shape"),
        (Description((ItemDescription(),), "brown"), "a shape on a brown background"),
        (Description((CIRCLE, CROSS)), "a large red circle and a small orange cross"),
        (Description((ItemDescription(colour="orange"),) * 2, None, "below"), "an orange shape below an orange shape"),
        (Description((ItemDescription("cross"),) * 2), "two crosses"),
        (Description((ItemDescription(),) * 2, "white"), "two shapes on a white background"),
    ],
)
def test_captions_with_unsaid_attributes_are_good_english(description, words):
    assert caption(description) == words


def test_the_standard_wording_states_the_description_and_nothing_else():
    for description in descriptions(500):
        assert parsed(caption(description)) == description


def test_random_wordings_state_the_same_in_either_order():
    rng = np.random.default_rng(7)
    for description in descriptions(2000):
        words = vary(description, rng)
        assert parsed(words) in (description, swapped(description)), words


def test_articles_are_correct_in_every_wording():
    rng = np.random.default_rng(8)
    for description in descriptions(1000):
        words = vary(description, rng)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", words), words


def test_random_wordings_vary():
    rng = np.random.default_rng(9)
    description = Description((CIRCLE, CROSS), "gray", "above")
    assert len({vary(description, rng) for _ in range(300)}) > 200


def test_swapping_the_items_reverses_the_relation():
    description = Description((CIRCLE, CROSS), "white", "above")
    assert swapped(description) == Description((CROSS, CIRCLE), "white", "below")
    assert swapped(swapped(description)) == description
    assert swapped(Description((CIRCLE,), "white")) == Description((CIRCLE,), "white")


def test_leaving_unsaid_keeps_the_number_of_items():
    full = Description((CIRCLE, CROSS), "white", "above")
    rng = np.random.default_rng(0)
    assert leave_unsaid(full, rng, chance=0) == full
    assert leave_unsaid(full, rng, chance=1) == Description((ItemDescription(), ItemDescription()))
    partly = [leave_unsaid(full, rng, chance=0.5) for _ in range(200)]
    for kept in partly:
        assert kept.background in (None, "white")
        assert kept.relation in (None, "above")
        for item, whole in zip(kept.items, full.items, strict=True):
            assert item.shape in (None, whole.shape)
            assert item.colour in (None, whole.colour)
            assert item.size in (None, whole.size)
    assert len(set(partly)) > 50
