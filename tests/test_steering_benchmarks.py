"""benchmarks/masks.py, previews.py and steering.py: the commands from end to end, and what they judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, tiny_networks

from benchmarks import masks, previews, steering
from benchmarks.__main__ import main
from benchmarks.models import BUNDLED, EMOJI
from clip_gen import ClipGen
from clip_gen.metrics.intervals import Share
from clip_gen.weights.model_folder import save_networks
from clip_gen.worlds.shapes.captions import Description, ItemDescription
from clip_gen.worlds.shapes.judge import read, satisfies
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import COLOURS, HELD_OUT, Item, Scene


@pytest.fixture(scope="module")
def blurry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose pictures are large enough for the judge, and never right."""
    config = replace(TINY, vqgan=replace(TINY.vqgan, resolution=64, patch=16))
    save_networks(tiny_networks(config=config), folder := tmp_path_factory.mktemp("models") / "blurry", training={})
    return folder


# Steering


def test_steering_keeps_every_verdict_and_continues_after_them(
    blurry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BUNDLED", "EMOJI"):
        monkeypatch.setattr(steering, name, blurry)
    asked, generate, out = [], ClipGen.generate, tmp_path / "results" / "steering.json"

    def watched(model: ClipGen, *words: str, seed: int, **settings: object) -> object:
        asked.append(seed)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return generate(model, *words, seed=seed, **settings)

    monkeypatch.setattr(ClipGen, "generate", watched)
    words = ["steering", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--pictures", "5"])
    kept = json.loads(out.read_text())
    assert (kept["images"]["rows"]["every attribute"]["total"], kept["images"]["met"]) == (5, False)
    assert [len(found.split()) for found in kept["negative"]["verdicts"].values()] == [1, 0, 0]
    main([*words, "--pictures", "6"])
    assert asked == [*range(5), 0, 1, 5, *range(1, 6), *range(6), *range(6), *[0, 1] * 5, *range(6)]
    results = json.loads(out.read_text())
    assert results["images"]["verdicts"] == {"every attribute": "0 0 0 0 0 0"}
    assert {row["total"] for row in results["negative"]["rows"].values()} == {6}
    assert {row["total"] for row in results["weights"]["rows"].values()} == {8}
    assert set(results["weights"]["verdicts"].values()) == {"0000 0000"}
    assert [results[part]["met"] for part in steering.PARTS][::2] == [False, False]
    assert '"met": false' in capsys.readouterr().out


def test_verdicts_of_another_model_are_not_kept(blurry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "BUNDLED", blurry)
    other = {"model": "another", "verdicts": {"every attribute": "1 1 1"}}
    (out := tmp_path / "steering.json").write_text(json.dumps({"images": other, "negative": other}))
    main(["steering", "--only", "images", "--pictures", "2", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["images"]["verdicts"] == {"every attribute": "0 0"}
    assert results["negative"] == other


def test_at_least_one_picture_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["steering", "--pictures", "0"])
    assert "--pictures is 0; give 1 or more" in capsys.readouterr().err


def test_the_bundled_models_follow_pictures_and_weights() -> None:
    model = ClipGen.load(BUNDLED, "cpu")
    assert any(steering.keeps_every_attribute(model, number) == [True] for number in range(2))
    assert sum(steering.shows_first(model, 0, weight=1.0)) >= 3
    assert sum(steering.shows_first(model, 0, weight=0.0)) <= 1
    assert any(steering.keeps_the_thing(ClipGen.load(EMOJI, "cpu"), number) == [True] for number in range(2))


@pytest.mark.parametrize("colour", COLOURS)
def test_only_red_is_seen_as_red(colour: str) -> None:
    small = Scene("white", (Item("heart", colour, "small", 0.5, 0.5, 0.12),))
    assert steering.shows_red(render(small)) == (colour == "red")


def test_two_prompts_differ_in_shape_and_colour_and_are_not_held_out() -> None:
    for number in range(40):
        first, second = steering.two_prompts(number)
        (one,), (other,) = first.items, second.items
        assert one.shape != other.shape
        assert one.colour != other.colour
        assert first.background == second.background
        assert not {(one.colour, one.shape), (other.colour, other.shape)} & set(HELD_OUT)


@pytest.mark.parametrize(
    ("part", "right", "met"),
    [
        ("images", [95], True),
        ("images", [94], False),
        ("negative", [2, 30, 40], True),
        ("negative", [3, 30, 40], False),
        ("emoji", [85], True),
        ("emoji", [84], False),
        ("weights", [9, 30, 50, 70, 91], True),
        ("weights", [9, 50, 49, 70, 91], True),
        ("weights", [9, 50, 20, 70, 91], False),
        ("weights", [10, 30, 50, 70, 91], False),
        ("weights", [9, 30, 50, 70, 90], False),
    ],
)
def test_targets_of_steering(part: str, right: list[int], met: bool) -> None:
    assert steering.is_met(part, [Share(count, 100) for count in right]) is met


# Previews


def test_runs_with_progress_and_previews_are_compared_with_plain_ones(tiny_model: ClipGen) -> None:
    progress, with_previews = previews.measure(tiny_model, runs=3, candidates=4)
    assert (progress["what"], with_previews["what"]) == ("progress", "previews")
    assert progress["previews in a run"] == 0
    assert min(progress["ratio"], with_previews["ratio"]) > 0


def test_the_command_previews_writes_its_ratios(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "previews.json"
    main(["previews", "--model", str(tiny_model_folder), "--runs", "1", "--candidates", "4", "--out", str(out)])
    results = json.loads(out.read_text())
    assert [row["what"] for row in results["ratios"]] == ["progress", "previews"]
    assert (results["machine"]["runs"], results["machine"]["candidates"]) == (1, 4)
    assert "| previews | " in capsys.readouterr().out


# Masks


def test_the_command_masks_judges_and_measures_the_scenes(
    blurry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(masks, "BUNDLED", blurry)
    out = tmp_path / "results" / "masks.json"
    main(["masks", "--scenes", "2", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results == json.loads(capsys.readouterr().out)
    assert [row["total"] for row in results["right"].values()] == [2, 32, 2]
    assert results["right"]["best of 16"]["share"] == 0
    assert 0 < results["band_decibels"]["mean"] < masks.MIN_DECIBELS
    assert results["met"] is False


def test_a_mask_covers_one_object_and_leaves_the_other() -> None:
    for number in range(8):
        case = masks.case(number, 64)
        erased = case.picture.copy()
        erased[case.mask] = erased[0, 0]
        left = Description(tuple(item for item in case.wanted.items if satisfies_one(erased, item)))
        assert len(left.items) == 1
        assert read(case.picture).background == case.wanted.background
        assert not satisfies(read(case.picture), case.wanted)


def satisfies_one(picture: np.ndarray, item: ItemDescription) -> bool:
    return satisfies(read(picture), Description((item,)))


def test_the_band_around_a_mask_ends_after_four_pixels() -> None:
    original, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True
    inside, outside, beside = original.copy(), original.copy(), original.copy()
    inside[20:30, 20:30] = outside[35, :] = 255
    beside[33, 25] = 255
    assert masks.band_error(inside, original, mask) == masks.band_error(outside, original, mask) == 0
    assert masks.band_error(beside, original, mask) == pytest.approx(255**2 / (18**2 - 10**2))
