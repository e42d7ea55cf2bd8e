"""worlds/*/vocabulary.py and worlds/vocabulary.py: what a model says that it knows."""

from __future__ import annotations

import pytest

from clip_gen.worlds.emoji.words import plural
from clip_gen.worlds.pairs import SeededPictures
from clip_gen.worlds.vocabulary import enumerated, words_between
from clip_gen.worlds.world import WORLDS, load_world


def listed(text: str) -> set[str]:
    """All words of the lists, without their headings."""
    lists = [line.partition(": ")[2] for line in text.splitlines()]
    return {word.strip("(),") for line in lists for word in line.lower().replace("-", " ").split()}


@pytest.mark.parametrize("name", WORLDS)
def test_every_word_of_the_captions_is_listed(name: str) -> None:
    world, pictures = load_world(name), SeededPictures(200, 3, 64)
    captions = " ".join(world.sampled_caption(pictures.rng(i)) for i in range(200))
    words = {word.strip(",") for word in captions.lower().replace("-", " ").split()}
    known = listed(world.vocabulary())
    assert words <= known | set(map(plural, known))


@pytest.mark.parametrize("name", WORLDS)
def test_the_first_line_is_short_enough_for_a_warning(name: str) -> None:
    first, blank, *_ = load_world(name).vocabulary().split("\n")
    assert 50 < len(first) <= 400
    assert blank == ""


def test_words_of_templates_leave_out_the_fields() -> None:
    templates = ["a {style} drawing of {scene}", "{things}, {a_background} sky"]
    assert words_between(templates) == ["a", "drawing", "of", "sky"]


def test_an_enumeration_has_commas_and_an_and() -> None:
    assert enumerated(["red", "green", "blue"]) == "red, green and blue"
