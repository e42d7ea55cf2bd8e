"""The words of the shapes world."""

from __future__ import annotations

from itertools import chain

from clip_gen.worlds.shapes.captions import (
    BACKGROUND_WORDS,
    NOUNS,
    OPENINGS,
    RELATION_WORDS,
    SETTINGS,
    SIZE_WORDS,
    TWO_WORDS,
)
from clip_gen.worlds.shapes.scenes import COLOURS, SHAPES
from clip_gen.worlds.vocabulary import enumerated, vocabulary_text, words_between


def vocabulary() -> str:
    """The content of vocabulary.txt."""
    backgrounds, sizes, relations = (
        list(chain.from_iterable(words.values())) for words in (BACKGROUND_WORDS, SIZE_WORDS, RELATION_WORDS)
    )
    shown = f"{enumerated(SHAPES)}; in {enumerated(list(COLOURS))}; {enumerated(list(SIZE_WORDS))}"
    summary = f"{shown}; on {enumerated(list(BACKGROUND_WORDS))}; one or two, {enumerated(list(RELATION_WORDS))}"
    lists = {
        "Shapes": [*SHAPES, *dict.fromkeys(NOUNS)],
        "Colours": COLOURS,
        "Backgrounds": backgrounds,
        "Sizes": sizes,
        "Relations": relations,
        "Counts": TWO_WORDS,
        "Other words": words_between([*OPENINGS, *SETTINGS, "a, an"]),
    }
    return vocabulary_text(summary, lists)
