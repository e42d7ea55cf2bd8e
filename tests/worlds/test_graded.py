"""An interrupted evaluation of a world resumes (worlds/graded.py and grading.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from clip_gen.__main__ import main
from clip_gen.worlds import grading
from clip_gen.worlds.graded import Candidate, GradedFile, Verdict

PROMPTS = 6


class Interrupted(Exception):
    pass


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the first prompts of the batches that are drawn, of two prompts each."""
    numbers: list[int] = []
    candidates = grading.Evaluation.candidates

    def noted(self: grading.Evaluation, chosen: list, start: int, source: str) -> list:
        numbers.append(start)
        return candidates(self, chosen, start, source)

    monkeypatch.setattr(grading, "PROMPTS_PER_BATCH", 2)
    monkeypatch.setattr(grading.Evaluation, "candidates", noted)
    return numbers


def evaluate(model: Path, out: Path, *options: str) -> dict[str, object]:
    words = ["--world", "shapes", "--prompts", str(PROMPTS), "--kinds", "one", "--out", str(out), *options]
    assert main(["evaluate", str(model), *words]) == 0
    return json.loads((out / "report.json").read_text())


def interrupt(model: Path, out: Path, after: int, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the evaluation in the batch after the first `after` ones."""
    candidates = grading.Evaluation.candidates

    def ending(self: grading.Evaluation, *arguments: object) -> list:
        if len(drawn) == after:
            raise Interrupted
        return candidates(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(grading.Evaluation, "candidates", ending)
        evaluate(model, out)
    drawn.clear()


def test_an_interrupted_evaluation_resumes_and_has_the_same_results(
    tiny_model_folder: Path, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tiny_model_folder, tmp_path / "whole")
    assert drawn == [0, 2, 4, 0, 2, 4]  # from text, and from image embeddings
    drawn.clear()
    out = tmp_path / "out"
    interrupt(tiny_model_folder, out, 4, drawn, monkeypatch)
    assert not (out / "report.json").exists()
    assert evaluate(tiny_model_folder, out) == whole
    assert drawn == [2, 4]
    sheets = [Image.open(folder / "sheet.png") for folder in (out, tmp_path / "whole")]
    assert sheets[0].tobytes() == sheets[1].tobytes()


def test_a_finished_evaluation_is_not_reused(tiny_model_folder: Path, tmp_path: Path, drawn: list[int]) -> None:
    evaluate(tiny_model_folder, tmp_path)
    drawn.clear()
    evaluate(tiny_model_folder, tmp_path)
    assert drawn == [0, 2, 4, 0, 2, 4]


def test_another_sampling_grades_all_prompts_again(
    tiny_model_folder: Path, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tiny_model_folder, tmp_path, 4, drawn, monkeypatch)
    evaluate(tiny_model_folder, tmp_path, "--temperature", "0.5")
    assert drawn == [0, 2, 4, 0, 2, 4]


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path, about = tmp_path / "graded.jsonl", {"seed": 0}
    shown = Candidate(Image.new("RGB", (4, 4), "red"), 0.25, (Verdict({"colour": True}, clean=True),))
    other = Candidate(None, 0.5, (Verdict({"colour": False}, clean=False),))
    GradedFile(path, about).append("one", [[shown, other], [other]])
    path.write_text(path.read_text()[:-5])
    first = GradedFile(path, about)
    assert [[(one.score, one.verdicts) for one in some] for some in first.rows["one"]] == [
        [(0.25, shown.verdicts), (0.5, other.verdicts)]
    ]
    assert first.rows["one"][0][0].picture.getpixel((0, 0)) == (255, 0, 0)
    first.append("one", [[other]])
    assert len(GradedFile(path, about).rows["one"]) == 2
    assert not GradedFile(path, {"seed": 1}).rows["one"]


def test_the_log_has_the_prompts_that_were_done_before(
    tiny_model_folder: Path,
    tmp_path: Path,
    drawn: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupt(tiny_model_folder, tmp_path, 2, drawn, monkeypatch)
    caplog.clear()
    with caplog.at_level("INFO"):
        evaluate(tiny_model_folder, tmp_path)
    assert "one object: 4 of 6 were done before" in caplog.text
    assert "one object: 6 of 6, " in caplog.text
