"""An interrupted evaluation of a world resumes (worlds/graded.py and grading.py)."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_gen.__main__ import main
from clip_gen.files import ROOT
from clip_gen.worlds import grading
from clip_gen.worlds.graded import Candidate, GradedFile, Verdict

PROMPTS = 6


class Interrupted(Exception):
    pass


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the first prompts of the batches that are drawn, of two prompts each.

    A judge that finds about half of an untrained model's pictures right.
    """
    numbers: list[int] = []
    candidates = grading.Evaluation.candidates

    def noted(self: grading.Evaluation, chosen: list, start: int, source: str) -> list:
        numbers.append(start)
        return candidates(self, chosen, start, source)

    def verdicts(self: grading.Evaluation, pictures: list[Image.Image], chosen: list) -> list[tuple[Verdict, ...]]:
        numbers = (zlib.crc32(picture.tobytes()) for picture in pictures)
        return [(Verdict({"colour": number % 2 == 0, "shape": number % 3 > 0}, number % 5 > 0),) for number in numbers]

    monkeypatch.setattr(grading, "PROMPTS_PER_BATCH", 2)
    monkeypatch.setattr(grading.Evaluation, "verdicts", verdicts)
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

    with monkeypatch.context() as patch:
        patch.setattr(grading.Evaluation, "candidates", ending)
        with pytest.raises(Interrupted):
            evaluate(model, out)
    drawn.clear()


def test_an_interrupted_evaluation_resumes_and_has_the_same_results(
    tiny_model_folder: Path, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tiny_model_folder, tmp_path / "whole")
    assert drawn == [0, 2, 4, 0, 2, 4]  # from text, and from image embeddings
    shares = {name: row["share"] for name, row in whole["rows"].items() if name.endswith("perfect ranker of 16")}
    assert len(shares) == 2
    assert all(shares.values())
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


def test_more_prompts_and_other_kinds_keep_what_was_graded(
    tiny_model_folder: Path, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tiny_model_folder, tmp_path, 2, drawn, monkeypatch)
    report = evaluate(tiny_model_folder, tmp_path, "--prompts", "8", "--kinds", "one", "unsaid")
    assert drawn == [4, 6, 0, 2, 4, 6, 0, 2, 4, 6]
    drawn.clear()
    assert report == evaluate(tiny_model_folder, tmp_path / "new", "--prompts", "8", "--kinds", "one", "unsaid")


def test_another_models_candidates_are_dropped(
    tiny_model_folder: Path, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    path = other / "gpt.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"head.weight": -tensors["head.weight"]}, path)
    interrupt(tiny_model_folder, tmp_path / "out", 4, drawn, monkeypatch)
    evaluate(other, tmp_path / "out")
    assert drawn == [0, 2, 4, 0, 2, 4]


def test_a_killed_evaluation_resumes_at_once(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["evaluate", str(tiny_model_folder), "--world", "shapes", "--kinds", "one", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "clip_gen", *words, "--prompts", "5000"], cwd=ROOT)
    graded, until = tmp_path / "out" / "work" / grading.GRADED, time.monotonic() + 120
    while not (graded.is_file() and graded.read_text().count("\n") > 1) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL
    with caplog.at_level("INFO"):
        assert main([*words, "--prompts", "8"]) == 0
    assert re.search(r"one object: [1-8] of 8 were done before", caplog.text)  # a part of a batch may be written


@pytest.mark.parametrize("damage", ["{}", "\0\0\0", '{"row": "one", "candidates": [{"score": 1}]}'])
def test_damaged_lines_are_dropped(tmp_path: Path, damage: str) -> None:
    path, candidate = tmp_path / "graded.jsonl", Candidate(None, 0.5, (Verdict({}, clean=False),))
    GradedFile(path, {}).append("one", [[candidate], [candidate], [candidate]])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], damage, *lines[3:], ""]))
    assert len(GradedFile(path, {}).rows["one"]) == 1
    assert len(GradedFile(path, {}).rows["one"]) == 1


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
