"""worlds/word_trainer.py: new words learn what known nouns mean, and nothing else changes."""

from __future__ import annotations

import numpy as np
import torch
from conftest import TINY

from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.worlds.word_trainer import learn_words

WORDS = {"pussycat": "circle", "film camera": "square"}  # of several tokens


def captions(rng: np.random.Generator) -> tuple[str, str]:
    word, colour = (options[rng.integers(len(options))] for options in (list(WORDS), ["red", "blue"]))
    return f"a {colour} {word}", f"a {colour} {WORDS[word]}"


def with_untrained_words() -> ClipEncoder:
    torch.manual_seed(0)
    encoder = ClipEncoder(TINY.clip)
    encoder.clip.token_embedding.weight[encoder.tokenize.encode("pussycat film camera spoon")] = 0
    return encoder


def cosine(encoder: ClipEncoder) -> float:
    new, known = (encoder.encode_text([f"a green {word}" for word in words]) for words in (WORDS, WORDS.values()))
    return float((new * known).sum(dim=1).mean())


def test_words_of_several_tokens_get_the_meaning_of_known_nouns_and_other_words_keep_theirs() -> None:
    encoder = with_untrained_words()
    before, kept = cosine(encoder), encoder.encode_text(["a red circle left of a horse"])
    table = encoder.clip.token_embedding.weight.clone()
    record = learn_words(encoder, captions, steps=20, seed=0)
    assert cosine(encoder) > before + 0.4
    assert torch.equal(encoder.encode_text(["a red circle left of a horse"]), kept)
    changed = (encoder.clip.token_embedding.weight != table).any(dim=1)
    assert set(changed.nonzero().flatten().tolist()) == set(encoder.tokenize.encode("pussycat film camera"))
    assert record["tokens"] == int(changed.sum())
    assert encoder.unknown_words("a pussycat, a film camera and a spoon") == ["spoon"]


def test_the_same_seed_gives_the_same_embeddings() -> None:
    first, second = with_untrained_words(), with_untrained_words()
    for encoder in (first, second):
        learn_words(encoder, captions, steps=2, seed=0)
    assert torch.equal(first.clip.token_embedding.weight, second.clip.token_embedding.weight)
