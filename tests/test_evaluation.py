"""evaluation/: shares, prompts, the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.evaluation.metrics import Share
from clip_gen.evaluation.prompts import KINDS, cases
from clip_gen.evaluation.report import Evaluation
from clip_gen.images import to_tensor
from clip_gen.sampling import Sampling
from clip_gen.shapes.judge import read, satisfies
from clip_gen.shapes.rendering import render


def test_intervals_are_wilsons() -> None:
    assert Share(50, 100).interval == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert Share(500, 500).interval == pytest.approx((0.9924, 1.0), abs=1e-4)
    assert Share(0, 10).interval[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_fixed_by_seed_and_number_and_true_of_their_scene(kind: str) -> None:
    chosen = cases(kind, 40, seed=0)
    assert cases(kind, 10, seed=0) == chosen[:10]
    assert cases(kind, 10, seed=1) != chosen[:10]
    assert all(satisfies(read(render(case.scene)), case.description) for case in chosen)


def test_kinds_are_what_they_say() -> None:
    assert all(len(case.scene.items) == 1 for case in cases("one", 40, 0))
    assert all(case.description.relation in case.prompt for case in cases("two", 40, 0))
    assert all(item.held_out for case in cases("held_out", 40, 0) for item in case.scene.items)
    assert not any(item.held_out for kind in ("one", "two") for case in cases(kind, 99, 0) for item in case.scene.items)
    unsaid = [case.description for case in cases("unsaid", 40, 0)]
    assert all(
        None in (d.background, *(v for i in d.items for v in (i.shape, i.colour, i.size)))
        or (len(d.items) == 2 and d.relation is None)
        for d in unsaid
    )


def test_the_command_writes_the_table_as_json_and_a_sheet(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tiny_model_folder), "--prompts", "3", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompts"] == 3
    for name, row in report["rows"].items():
        assert name in table
        assert row["total"] == 3
    assert Image.open(tmp_path / "sheet.png").size[0] > 100


def test_a_perfect_decoder_scores_full_marks_and_noise_scores_none(tiny_model: ClipGen) -> None:
    """The grading itself: pictures that are right count as right, whatever made them."""
    chosen = cases("one", 5, 0)
    evaluation = Evaluation(tiny_model, 5, 0, Sampling())
    graded = evaluation._graded(chosen, 0, "text")
    assert [len(right) for _, right, _ in graded] == [16] * 5
    assert not any(any(right) for _, right, _ in graded)  # an untrained model draws noise
    assert all(satisfies(read(np.asarray(Image.fromarray(render(c.scene)))), c.description) for c in chosen)
    assert to_tensor([render(c.scene) for c in chosen]).shape == (5, 3, 64, 64)
