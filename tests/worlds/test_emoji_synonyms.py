"""worlds/emoji/synonyms.py and fill_unseen_words: words that no caption uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from conftest import TINY

from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.worlds.clip_trainer import fill_unseen_words
from clip_gen.worlds.emoji.synonyms import FILE, candidates, find_synonyms, is_token, senses, synonyms
from clip_gen.worlds.emoji.words import plural, things

TEXTS = {text for sense in senses() for text in (*sense.singular, *sense.plural)}
# Directions of a few words in the space of a sentence encoder; other words are far from all of them.
NEAR = {
    "kitty": {"cat": 0.9, "kitten": 0.87, "pet": 0.5},
    "kitties": {"cats": 0.9, "cat": 0.95},
    "crimson": {"red": 0.8, "rose": 0.9},
    "colour": {"red": 0.8, "blue": 0.79},
    "skyscraper": {"office building": 0.9, "house": 0.7},
    "table": {"bed": 0.4},
    "purring": {"cat": 0.95},
}
LEMMAS = {
    "kitty": {"NOUN": ["kitty"]},
    "kitties": {"NOUN": ["kitty"]},
    "crimson": {"ADJ": ["crimson"], "NOUN": ["crimson"]},
    "colour": {"ADJ": ["colour"]},
    "skyscraper": {"NOUN": ["skyscraper"]},
    "table": {"NOUN": ["table"]},
    "purring": {"VERB": ["purr"]},
}


def embed(texts: Sequence[str]) -> np.ndarray:
    """An axis for each word of captions. Words of NEAR point to these, and with the rest of their length elsewhere."""
    axes = {text: i for i, text in enumerate(sorted(TEXTS))}
    rows = np.zeros((len(texts), len(axes) + 1))
    for row, text in zip(rows, (text.removeprefix("a photo of a ") for text in texts), strict=True):
        if text in axes:
            row[axes[text]] = 1
        for other, cosine in NEAR.get(text, {}).items():
            row[axes[other]] = cosine
    return rows


def found(word: str) -> Mapping[str, float] | None:
    return find_synonyms([word], embed, LEMMAS.__getitem__).get(word)


def test_a_noun_gets_the_nearest_nouns_with_weights() -> None:
    assert found("kitty") == {"cat": 0.73, "kitten": 0.27}


def test_a_plural_gets_plurals_and_a_colour_word_gets_colours() -> None:
    assert found("kitties") == {"cats": 1.0}
    assert found("crimson") == {"red": 1.0}


@pytest.mark.parametrize("word", ["colour", "skyscraper", "table", "purring"])
def test_a_word_stays_unknown_without_one_near_sense_in_one_token(word: str) -> None:
    assert found(word) is None  # between colours; near two words; near to nothing; a verb


def test_the_table_has_words_of_the_vocabulary_that_captions_do_not_use() -> None:
    table, words = json.loads(FILE.read_text()), set(candidates())
    assert 500 < len(table) < 3000
    assert set(table) <= words
    for word, weights in table.items():
        assert all(is_token(other) and other in TEXTS for other in weights), word
        assert sum(weights.values()) == pytest.approx(1, abs=0.03)
    assert max(table["kitty"], key=table["kitty"].get) == "cat"
    assert max(table["automobile"], key=table["automobile"].get) == "car"
    assert not set(table) & {"the", "and", "with", "five", "not", "running"}


@pytest.mark.parametrize(("half", "right", "wrong"), [(0, 16, 1), (1, 16, 3)])
def test_most_synonyms_in_the_table_mean_the_right_thing(half: int, right: int, wrong: int) -> None:
    """Nouns that no caption uses and that are one token: 32 with which the threshold was chosen, and 39 others."""
    table, counts = json.loads(FILE.read_text()), {True: 0, False: 0}
    for thing in things().values():
        for noun in filter(is_token, thing.unseen):
            if noun in table and hashlib.sha256(noun.encode()).digest()[0] % 2 == half:
                weights = table[noun]
                counts[max(weights, key=weights.get) in {*thing.nouns, *map(plural, thing.nouns)}] += 1
    assert counts == {True: right, False: wrong}


def test_a_related_noun_goes_before_a_synonym() -> None:
    assert synonyms()["pussycat"] == {"cat": 1.0}
    assert synonyms()["accommodations"] == {"hotel": 1.0}


def test_only_words_that_were_never_trained_are_filled() -> None:
    encoder = ClipEncoder(TINY.clip)
    table, numbers = encoder.clip.token_embedding.weight, encoder.tokenize.bpe.encoder
    kitty, cat, kitten, pony, horse = (numbers[f"{word}</w>"] for word in ("kitty", "cat", "kitten", "pony", "horse"))
    table[[kitty, pony, horse]] = 0
    before = table.clone()
    entries = {"kitty": {"cat": 0.6, "kitten": 0.2, "horse": 0.2}, "kitten": {"cat": 1.0}, "pony": {"horse": 1.0}}
    entries |= {"pussycat": {"cat": 1.0}, "film camera": {"camera": 1.0}}  # of several tokens
    for _ in range(2):  # the second time nothing changes
        fill_unseen_words(encoder, entries)
        changed = (table != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == [kitty]  # horse was never trained itself
        assert torch.allclose(table[kitty], 0.75 * before[cat] + 0.25 * before[kitten])
    assert encoder.unknown_words("a kitty and a pony") == ["pony"]
