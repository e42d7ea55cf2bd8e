"""The words of the emoji world."""

from __future__ import annotations

from itertools import chain

from clip_gen.worlds.emoji.captions import (
    BACKGROUND_WORDS,
    LAYOUT_WORDS,
    NOUNS,
    OPENINGS,
    SETTINGS,
    STYLE_WORDS,
    STYLED,
)
from clip_gen.worlds.emoji.drawings import COLOURS
from clip_gen.worlds.emoji.related_nouns import related_nouns
from clip_gen.worlds.emoji.scenes import BACKGROUNDS
from clip_gen.worlds.emoji.synonyms import synonyms
from clip_gen.worlds.emoji.words import kinds, plural, things
from clip_gen.worlds.vocabulary import enumerated, vocabulary_text, words_between

WELL_KNOWN = ("cat", "dog", "pizza", "car", "house", "umbrella", "guitar")


def vocabulary() -> str:
    """The content of vocabulary.txt."""
    summary = (
        f"{len(things())} things such as {enumerated(WELL_KNOWN)}; in {enumerated(list(COLOURS))}; on backgrounds in "
        f"{len(BACKGROUNDS)} colours; in {len(STYLE_WORDS)} styles; one, two with a relation, or up to four of the same"
    )
    backgrounds = [BACKGROUND_WORDS.get(name, (name,)) for name in BACKGROUNDS]
    nouns = [noun for thing in things().values() for noun in thing.nouns]
    lists = {
        "Things": nouns,
        "Kinds of things": [*kinds(), *NOUNS],
        "Plurals": map(plural, [*nouns, *kinds(), *NOUNS]),
        "Colours": COLOURS,
        "Backgrounds": chain.from_iterable(backgrounds),
        "Sizes, places, relations and counts": chain.from_iterable(LAYOUT_WORDS.values()),
        "Styles": chain.from_iterable(STYLE_WORDS.values()),
        "Other words": words_between([*OPENINGS, *SETTINGS, *STYLED, "a, an"]),
        "Words that no caption used, with the nearest that captions use": (
            f"{word} ({max(weights, key=weights.get)})" for word, weights in synonyms().items()
        ),
        "Their plurals": map(plural, related_nouns()),
    }
    return vocabulary_text(summary, lists)
