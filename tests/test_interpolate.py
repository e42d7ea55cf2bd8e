"""interpolate.py: frames from one prompt to another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from clip_gen import ClipGen, pipeline
from clip_gen.__main__ import main
from clip_gen.prompts import mixed_prompt, parse_prompt


def test_a_mixed_prompt_keeps_the_weights_and_escapes_of_both() -> None:
    mixed = mixed_prompt("a:3 | b\\|c", "at 12:30", 0.25)
    assert [(part.text, round(part.weight, 4)) for part in parse_prompt(mixed)] == [
        ("a", 0.5625),
        ("b|c", 0.1875),
        ("at 12:30", 0.25),
    ]
    assert parse_prompt(mixed_prompt("a", "b", 0)) == parse_prompt("a")
    assert parse_prompt(mixed_prompt("a\\", "b", 0)) == parse_prompt("a\\")
    assert parse_prompt(mixed_prompt("a", "b", 1)) == parse_prompt("b")
    with pytest.raises(ValueError, match="the last prompt has the part 'b: c'"):
        mixed_prompt("a", "b: c | d", 0.5)


def test_frames_are_one_candidate_with_the_highest_scores(
    tiny_model: ClipGen, tiny_model_folder: Path, tmp_path: Path
) -> None:
    words = ["interpolate", "a red circle", "a star", "--frames=5", "--candidates=3", "--seed=7"]
    assert main([*words, "--model", str(tiny_model_folder), "--out", str(tmp_path), "--frame-seconds=0.2"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"000{i}.png" for i in range(5)), "animation.webp"]
    prompts = ["a red circle", *(f"a red circle:{3 - i} | a star:{1 + i}" for i in range(3)), "a star"]
    few = {"candidates": 3, "num_outputs": 3, "seed": 7, "clip_rerank": False}
    results = [tiny_model.generate(prompt, **few) for prompt in prompts]
    best = int(np.sum([result.scores for result in results], axis=0).argmax())
    for i, result in enumerate(results):
        frame = Image.open(tmp_path / f"000{i}.png")
        assert frame.tobytes() == result.images[best].tobytes()
        assert (frame.text["number"], frame.text["seed"]) == (str(best), "7")
    animation = Image.open(tmp_path / "animation.webp")
    assert sum(frame.load() and frame.info["duration"] for frame in ImageSequence.Iterator(animation)) == 5 * 200
    assert animation.info["loop"] == 0


def test_a_random_seed_is_the_same_for_all_frames(tiny_model_folder: Path, tmp_path: Path) -> None:
    words = ["interpolate", "a star", "a ring", "--frames=3", "--candidates=1", "--out", str(tmp_path)]
    assert main([*words, "--model", str(tiny_model_folder)]) == 0
    assert len({Image.open(path).text["seed"] for path in tmp_path.glob("*.png")}) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a", "b", "--frames=1"], "interpolate: frames is 1; give a whole number, 2 to 1000"),
        (["a", "?"], "interpolate: prompt is '?', without a letter"),
        (["a", "b: c | d"], "interpolate: the last prompt has the part 'b: c', whose weight is 'c'"),
        (["a", "b", "--frame-seconds=0"], "interpolate: frame-seconds is 0.0; give a number, 0.01 to 10"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_networks", None)
    assert main(["interpolate", *words]) == 1
    assert sentence in capsys.readouterr().err
