"""worlds/emoji/words.py and drawings.py: things have names of their own and three drawings, also in other colours."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clip_gen.worlds.emoji import words
from clip_gen.worlds.emoji.drawings import (
    ARCHIVE,
    COLOURS,
    MIN_CHROMA,
    STYLES,
    dominant_hue,
    drawing,
    from_oklab,
    recoloured,
    to_oklab,
)
from clip_gen.worlds.emoji.packing import slug
from clip_gen.worlds.emoji.words import kinds, plural, things, with_article


def test_every_thing_has_a_noun_and_is_written_once() -> None:
    lines = (Path(words.__file__).parent / "words.yaml").read_text(encoding="utf-8").splitlines()
    written = [line.partition(":")[0].strip('"') for line in lines if not line.startswith("#")]
    assert len(things()) >= 300
    assert sorted(written) == sorted(things())
    assert all(thing.nouns for thing in things().values())


def test_no_noun_names_two_things_and_no_kind_is_a_noun() -> None:
    nouns = Counter(noun for thing in things().values() for noun in thing.nouns + thing.unseen)
    assert [noun for noun, count in nouns.items() if count > 1] == []
    assert [kind for kind in kinds() if kind in nouns] == []
    assert {*nouns, *kinds()} & {*COLOURS, *STYLES} == {"orange"}  # a fruit too


def test_a_kind_has_several_things() -> None:
    assert kinds()["pet"] == {"dog", "cat", "hamster", "rabbit"}
    assert all(len(names) > 1 for names in kinds().values())


@pytest.mark.parametrize(
    ("noun", "one", "several"),
    [
        ("cat", "a cat", "cats"),
        ("ape", "an ape", "apes"),
        ("unicorn", "a unicorn", "unicorns"),
        ("fox", "a fox", "foxes"),
        ("ox", "an ox", "oxen"),
        ("snowman", "a snowman", "snowmen"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("box", "a box", "boxes"),
        ("brush", "a brush", "brushes"),
        ("peach", "a peach", "peaches"),
        ("bus", "a bus", "buses"),
        ("puppy", "a puppy", "puppies"),
        ("monkey", "a monkey", "monkeys"),
        ("mouse", "a mouse", "mice"),
        ("maple leaf", "a maple leaf", "maple leaves"),
        ("slice of pizza", "a slice of pizza", "slices of pizza"),
        ("loaf of bread", "a loaf of bread", "loaves of bread"),
        ("tropical fish", "a tropical fish", "tropical fish"),
        ("scissors", "scissors", "scissors"),
        ("milk", "milk", "milk"),
        ("glass of milk", "a glass of milk", "glasses of milk"),
        ("TV", "a TV", "TVs"),
    ],
)
def test_nouns_have_their_article_and_plural(noun: str, one: str, several: str) -> None:
    assert (with_article(noun, noun), plural(noun)) == (one, several)


def test_an_article_agrees_with_the_first_word_of_the_phrase() -> None:
    assert with_article("orange cat", "cat") == "an orange cat"
    assert with_article("red apple", "apple") == "a red apple"
    assert with_article("orange scissors", "scissors") == "orange scissors"


def test_every_thing_has_a_drawing_of_each_artist() -> None:
    assert {*zipfile.ZipFile(ARCHIVE).namelist()} == {f"{style}/{name}.webp" for style in STYLES for name in things()}
    different = set()
    for number, name in enumerate(things()):
        pixels = drawing(name, STYLES[number % 3])
        assert pixels.shape == (128, 128, 4)
        assert 0.1 < (pixels[..., 3] > 128).mean() < 1, name
        different.add(pixels.tobytes())
    assert len(different) == len(things())


def test_the_packages_of_the_drawings_have_a_name_for_each_thing() -> None:
    assert [slug(name) for name in ("woman’s boot", "1st place medal", "jack-o-lantern", "Christmas tree")] == [
        "womans-boot", "1st-place-medal", "jack-o-lantern", "christmas-tree"
    ]  # fmt: skip
    assert len({slug(name) for name in things()}) == len(things())


def test_oklab_and_back_gives_the_same_colours() -> None:
    rgb = np.random.default_rng(0).random((500, 3))
    assert np.abs(from_oklab(to_oklab(rgb)) - rgb).max() < 1e-3
    # The reference values of white and of pure red, from the article that defines OKLab.
    assert np.allclose(to_oklab(np.ones(3)), [1, 0, 0], atol=1e-3)
    assert np.allclose(to_oklab(np.array([1.0, 0, 0])), [0.628, 0.225, 0.126], atol=1e-3)


def chroma_and_hue(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lab = to_oklab(np.float32(rgb) / 255)
    return np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1])


@pytest.mark.parametrize("name", ["frog", "pizza", "couch and lamp", "strawberry"])
def test_recolouring_changes_the_hue_and_keeps_gray_pixels_and_the_outline(name: str) -> None:
    for style in STYLES:
        if dominant_hue(name, style) is None:
            continue
        before = drawing(name, style)
        chroma, _ = chroma_and_hue(before[..., :3])
        gray, solid = chroma < MIN_CHROMA / 2, before[..., 3] > 128
        for colour, rgb in COLOURS.items():
            after = recoloured(name, style, colour)
            assert np.array_equal(after[..., 3], before[..., 3])
            assert np.abs(after[gray].astype(int) - before[gray]).max(initial=0) <= 1
            moved = solid & (np.abs(after[..., :3].astype(int) - before[..., :3]).max(axis=2) > 2)
            now, hues = chroma_and_hue(after[..., :3])
            wanted = float(chroma_and_hue(np.array(rgb))[1])
            turns = np.abs((hues[moved & (now > MIN_CHROMA)] - wanted + np.pi) % (2 * np.pi) - np.pi)
            assert np.median(turns) < 0.2, (style, colour)


def test_recolouring_keeps_the_shading() -> None:
    before, after = drawing("pig", "3d"), recoloured("pig", "3d", "blue")
    lightness = [to_oklab(np.float32(pixels[before[..., 3] > 128, :3]) / 255)[:, 0] for pixels in (before, after)]
    assert np.corrcoef(lightness)[0, 1] > 0.95


def test_drawings_of_many_or_no_colours_have_no_dominant_hue() -> None:
    for name in ("panda", "rainbow", "soccer ball"):
        assert dominant_hue(name, "noto") is None
    with pytest.raises(AssertionError, match="panda in noto has no dominant hue"):
        recoloured("panda", "noto", "blue")
    for colour, name in (("red", "strawberry"), ("orange", "carrot"), ("pink", "pig")):
        assert dominant_hue(name, "flat") == pytest.approx(chroma_and_hue(np.array(COLOURS[colour]))[1], abs=0.35)
