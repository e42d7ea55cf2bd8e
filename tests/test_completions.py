"""completions.py: what a prompt leaves unsaid, and the phrases for it."""

from __future__ import annotations

import pytest

from clip_gen.completions import completed, needed
from clip_gen.config import Completion, ModelConfig, read_config
from clip_gen.files import ROOT

GROUND = Completion(["on a red background", "on a blue background"], unless=["background", "on red"])
STYLE = Completion(["in flat style", "in 3d style", "in noto style"], unless=["style"])
RELATION = Completion(["left of", "above"], unless=["fork and knife"], replaces=["next to", "and"])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a cat"], [GROUND, STYLE]),
        (["A cat on a RED background, flat style"], []),
        (["a cat on red"], [STYLE]),
        (["a cat on  the red"], [STYLE]),
        (["a cat on a reddish mat"], [GROUND, STYLE]),
        (["a background: in some style"], []),
        (["a cat and a dog"], [GROUND, STYLE, RELATION]),
        (["a cat\nAND a dog"], [GROUND, STYLE, RELATION]),
        (["a cat next, to a dog"], [GROUND, STYLE, RELATION]),
        (["a sandy beach"], [GROUND, STYLE]),
        (["a salt-and-pepper beard"], [GROUND, STYLE]),
        (["a fork and a knife"], [GROUND, STYLE]),
        (["a cat", "a blue background"], [STYLE]),
        (["a cat and a dog", "a pig"], [GROUND, STYLE, RELATION]),
        (["猫"], [GROUND, STYLE]),
    ],
)
def test_a_prompt_needs_the_completions_that_no_part_says_anything_of(
    texts: list[str], expected: list[Completion]
) -> None:
    assert needed(texts, [GROUND, STYLE, RELATION]) == expected


def test_completions_are_chosen_evenly_and_independently() -> None:
    chances = [(i + 0.5) / 60 for i in range(60)]
    texts = [completed("a cat", [GROUND, STYLE], chance) for chance in chances]
    assert set(texts) == {f"a cat {ground} {style}" for ground in GROUND.phrases for style in STYLE.phrases}
    assert {texts.count(text) for text in texts} == {10}
    assert completed("a cat", [GROUND, STYLE], 1 - 2**-24) == "a cat on a blue background in noto style"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sand next to a cat and a dog", "Sand left of a cat and a dog"),
        ("a cat next  to a dog", "a cat left of a dog"),
        ("a cat, And a dog", "a cat, left of a dog"),
        (r"a \1 and a dog", r"a \1 left of a dog"),
        ("a brand of sand", "a brand of sand"),
    ],
)
def test_a_phrase_takes_the_place_of_the_first_words_that_it_replaces(text: str, expected: str) -> None:
    assert completed(text, [RELATION], 0.0) == expected
    assert completed(text, [RELATION, STYLE], 0.0) == f"{expected} in flat style"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat and a dog", "a cat left of a dog on a white background in noto style"),
        ("an apple next to a banana on red", "an apple left of a banana on red in noto style"),
        ("a cat on a horse", "a cat above a horse on a white background in noto style"),
        ("a fork and knife", "a fork and knife on a white background in noto style"),
        ("a red background with a cat", "a red background with a cat in noto style"),
        ("a cat with a flat style", "a cat with a flat style on a white background"),
        ("a black and white cat", "a black and white cat on a white background in noto style"),
        ("three cats, 3d style, sky blue background", "three cats, 3d style, sky blue background"),
        ("a cat on top of a horse", "a cat on top of a horse on a white background in noto style"),
        ("a cat left of a dog and a pig", "a cat left of a dog and a pig on a white background in noto style"),
    ],
)
def test_the_default_model_completes_relation_background_and_style(prompt: str, expected: str) -> None:
    completions = read_config(ROOT / "checkpoints" / "emoji" / "config.yaml", ModelConfig).bridge.completions
    assert completed(prompt, needed([prompt], completions), 0.0) == expected
