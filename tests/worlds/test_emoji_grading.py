"""worlds/emoji/prompts.py, and worlds/grading.py with the emoji world."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, tiny_networks

from clip_gen.__main__ import main
from clip_gen.weights.model_folder import save_networks
from clip_gen.worlds.emoji.judge import read, satisfies
from clip_gen.worlds.emoji.prompts import HELD_OUT, KINDS, cases
from clip_gen.worlds.emoji.rendering import render
from clip_gen.worlds.emoji.scenes import held_out_by
from clip_gen.worlds.emoji.words import kinds, things


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_depend_on_seed_and_number_and_fit_their_scene(kind: str) -> None:
    chosen = cases(kind, 20, seed=0)
    assert cases(kind, 5, seed=0) == chosen[:5]
    assert cases(kind, 5, seed=1) != chosen[:5]
    assert sum(satisfies(read(render(case.scene)), case.description) for case in chosen) >= 19


@pytest.mark.parametrize("kind", KINDS)
def test_only_held_out_kinds_have_held_out_combinations_and_only_theirs(kind: str) -> None:
    for case in cases(kind, 40, seed=0):
        assert held_out_by(case.scene) == tuple(name == kind for name in HELD_OUT)


def test_prompts_say_what_a_user_would_say() -> None:
    for case in cases("one", 20, 0):
        thing = things()[case.scene.items[0].name]
        assert case.prompt.removeprefix("an ").removeprefix("a ").startswith(thing.nouns[0])
        assert case.prompt.endswith(f" on {'an' if case.scene.background == 'orange' else 'a'} "
                                    f"{case.scene.background} background")  # fmt: skip
    assert all(case.scene.layout in case.prompt for case in cases("two", 20, 0))
    assert all(f" {case.description.things[0].colour} " in f" {case.prompt}" for case in cases("coloured", 20, 0))
    assert all(case.prompt.split()[0] == case.scene.layout for case in cases("counts", 20, 0))
    assert all(f"in the {case.scene.layout} corner" in case.prompt for case in cases("positions", 20, 0))
    assert all(case.prompt.endswith(f"{case.scene.items[0].style} style") for case in cases("styled", 20, 0))


def test_unsaid_prompts_say_a_kind_or_no_background() -> None:
    chosen = [case.description for case in cases("unsaid", 60, 0)]
    assert all(said.things[0].kind or said.background is None for said in chosen)
    assert {bool(said.things[0].kind) for said in chosen} == {True, False}
    assert all(said.things[0].kind in kinds() for said in chosen if said.things[0].kind)


def test_synonyms_are_nouns_that_no_caption_uses() -> None:
    used = {noun for thing in things().values() for noun in thing.nouns}
    for case in cases("synonyms", 40, 0):
        unseen = things()[case.description.things[0].name].unseen
        nouns = [noun for noun in unseen if f" {noun} on " in f" {case.prompt}"]
        assert nouns
        assert not set(nouns) & used


def test_evaluate_takes_the_world_from_the_models_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    config = replace(TINY, name="emoji", vqgan=replace(TINY.vqgan, resolution=64, patch=16))
    save_networks(tiny_networks(config=config), model, training={})
    words = [
        "evaluate",
        str(model),
        "--prompts",
        "3",
        "--kinds",
        "one",
        "held_out_styles",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    table, report = capsys.readouterr().out, json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"]["one thing on a background, renders"]["right"] == 3
    assert report["rows"]["a thing in a held-out style, renders, style"]["right"] == 3
    assert report["rows"]["one thing on a background, best of 16"]["right"] == 0
    assert "one thing on a background, reconstructions" in report["decibels"]
    assert "from image embeddings, best of 16" in table


def test_evaluate_asks_for_the_world_of_other_models(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(tiny_model_folder), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert '"tiny", does not tell what it draws; add --world shapes or --world emoji' in capsys.readouterr().err
    assert main([*words, "--world", "emoji", "--kinds", "one", "held_out"]) == 1
    assert 'no kind of prompts is called "held_out"; choose from one, two' in capsys.readouterr().err
