"""metrics/intervals.py, and prompts.py and grading.py of the shapes world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.images import to_tensor
from clip_gen.metrics.intervals import Share
from clip_gen.sampling.sampler import Sampling
from clip_gen.weights.model_folder import Networks
from clip_gen.worlds.grading import Evaluation
from clip_gen.worlds.shapes.grading import WORLD
from clip_gen.worlds.shapes.judge import read, satisfies
from clip_gen.worlds.shapes.prompts import KINDS, cases
from clip_gen.worlds.shapes.rendering import render


def test_intervals_are_wilsons() -> None:
    assert Share(50, 100).interval == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert Share(500, 500).interval == pytest.approx((0.9924, 1.0), abs=1e-4)
    assert Share(0, 10).interval[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_depend_on_seed_and_number_and_fit_their_scene(kind: str) -> None:
    chosen = cases(kind, 40, seed=0)
    assert cases(kind, 10, seed=0) == chosen[:10]
    assert cases(kind, 10, seed=1) != chosen[:10]
    assert all(satisfies(read(render(case.scene)), case.description) for case in chosen)


def test_each_kind_of_prompt_has_its_scenes() -> None:
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
    sampling = {"temperature": 0.5, "top_k": 9, "top_p": 0.75, "guidance": 1.5}
    options = ["--world", "shapes", "--prompts", "3", "--out", str(tmp_path)]
    options += [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert (
        main(
            [
                "evaluate",
                str(tiny_model_folder),
                "--world",
                "shapes",
                "--prompts",
                "3",
                "--out",
                str(tmp_path),
                *options,
            ]
        )
        == 0
    )
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prompts"] == 3
    assert report["sampling"] == sampling
    assert next(iter(report["rows"])) == "one object, renders"
    assert {"one object, reconstructions", "two objects with a relation, from image embeddings, best of 16"} <= set(
        report["rows"]
    )
    for name, row in report["rows"].items():
        assert name in table
        # Attributes that a prompt leaves unsaid are not graded.
        assert row["total"] == 3 or (row["total"] < 3 and "left unsaid, " in name)
    assert Image.open(tmp_path / "sheet.png").size[0] > 100


def test_clip_chooses_among_candidates_and_the_judge_grades_them(tiny_model: ClipGen) -> None:
    """A generator that draws the right scene as its candidate 5 and another scene as every other one."""
    chosen = cases("one", 6, 0)
    wrong = to_tensor([render(case.scene) for case in cases("two", 6, 0)])
    right = to_tensor([render(case.scene) for case in chosen])
    drawn = iter(range(len(chosen)))

    class Painter:
        def decode(self, tokens: torch.Tensor) -> torch.Tensor:
            i = next(drawn)
            return torch.stack([right[i] if candidate == 5 else wrong[i] for candidate in range(16)])

    class Critic:
        """Likes candidate 5 of the first four prompts, and the first candidate of the others."""

        def encode_text(self, prompts: list[str]) -> torch.Tensor:
            return torch.ones(len(prompts), 16) / 4

        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            liked = torch.zeros(len(images) // 16, 16, 16)
            liked[:4, 5] = 1
            liked[4:, 0] = 1
            return liked.view(len(images), 16)

    model = ClipGen(
        Networks(tiny_model.config, Critic(), Painter(), tiny_model.gpt, tiny_model.bridge), tiny_model.device
    )
    evaluation = Evaluation(WORLD, model, 6, 0, Sampling())
    evaluation.grade("one", "text")
    shares = {name.removeprefix("one object, "): share.right for name, share in evaluation.rows.items()}
    whole = {"best of 1": 0, "best of 4": 0, "best of 16": 4, "perfect ranker of 16": 6}
    assert whole.items() <= shares.items()
    assert shares["best of 16, count"] == 4
    assert 4 <= shares["best of 16, colour"] <= 6
    assert shares["best of 16, a clean picture"] == 6
    assert [candidate.right for candidate in evaluation.best["one"]] == [True] * 4 + [False] * 2


def test_an_untrained_model_is_wrong_everywhere(tiny_model: ClipGen) -> None:
    evaluation = Evaluation(WORLD, tiny_model, 3, 0, Sampling())
    evaluation.run(["one", "unsaid"])
    reconstructions = [f"{WORLD.titles[kind]}, reconstructions" for kind in ("one", "unsaid")]
    assert [name for name in evaluation.rows if name.endswith("reconstructions")] == reconstructions
    assert all(share.right == 0 for name, share in evaluation.rows.items() if ", renders" not in name)
