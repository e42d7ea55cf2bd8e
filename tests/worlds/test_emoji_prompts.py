"""worlds/emoji/prompts.py: prompts of each kind; and the world that `evaluate` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_gen.__main__ import main
from clip_gen.worlds.emoji.prompts import HELD_OUT, KINDS, cases
from clip_gen.worlds.emoji.scenes import held_out_by
from clip_gen.worlds.emoji.words import kinds, things


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


def test_evaluate_asks_for_the_world_of_other_models(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(tiny_model_folder), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert '"tiny", does not tell what it draws; add --world shapes or --world emoji' in capsys.readouterr().err
    assert main([*words, "--world", "emoji", "--kinds", "one", "held_out"]) == 1
    assert 'no kind of prompts is called "held_out"; choose from one, two' in capsys.readouterr().err
