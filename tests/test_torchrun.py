"""Two real processes of torchrun share the work of a command, and what a killed one leaves is done on resume."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from torchrun import run, said

from clip_gen.__main__ import main
from clip_gen.training.datasets import open_rows
from clip_gen.training.encoding import TOKENS
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings

# Each test starts torch in six processes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAVE, WRITE = "clip_gen.training.encoding:save_array", "clip_gen.prompts_file:write_pictures"
PROMPTS = 24


def parts(folder: Path) -> dict[str, int]:
    """The parts of the tokens that are encoded, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("work/encoded/parts/tokens-*.npy")}


def test_a_training_shares_its_encoding_and_does_the_part_of_a_killed_process_on_resume(
    photos: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    out, alone, first, second = (tmp_path / name for name in ("out", "alone", "first", "second"))
    settings = TrainSettings(
        base=str(tiny_model_folder), vqgan_steps=2, transformer_steps=2, batch_size=4, precision="32-true"
    )
    words = ["train", str(photos), "--out", str(out), "--base", settings.base, "--vqgan-steps=2"]
    words += ["--transformer-steps=2", "--batch-size=4", "--precision=32-true", "--devices=2", "--strategy=ddp"]
    assert run(words, SAVE, first, KILLED="1", LAST="4") != 0  # with the tokens of its second part
    assert "under torchrun as before, this command resumes the training" in said(first, 0, "stderr")
    done = parts(out)
    assert 1 <= len(done) < 11
    assert not (out / "work" / "encoded" / TOKENS).exists()
    shutil.copytree(out, alone)
    shutil.rmtree(alone / "work" / "encoded")

    assert run(words, SAVE, second) == 0, said(second, 0, "stderr")
    shares = [re.findall(r"tokens-0.*", said(second, rank)) for rank in (0, 1)]
    assert all(shares)
    assert sorted([*done, *shares[0], *shares[1]]) == sorted(parts(out))
    assert len(parts(out)) == 11
    assert done.items() <= parts(out).items()
    Training(photos, alone, settings).run()  # with the same VQGAN
    rows = [open_rows(folder / "work" / "encoded" / TOKENS)[:] for folder in (out, alone)]
    assert np.array_equal(*rows)


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("".join(f"a star number {number}\n" for number in range(PROMPTS)))
    return str(tmp_path / "prompts.txt")


def test_prompts_of_a_file_are_shared_and_those_of_a_killed_process_drawn_on_resume(
    prompts: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    out, first, second = (tmp_path / name for name in ("out", "first", "second"))
    words = ["generate", "--model", str(tiny_model_folder), "--prompts-file", prompts, "--candidates=2"]
    words += ["--num-outputs=1", "--seed=7", "--out"]
    assert run([*words, str(out)], WRITE, first, KILLED="1", LAST="4") != 0
    assert 3 <= len(drawn(out)) < PROMPTS
    finished = {json.loads(line)["file"] for line in (out / "manifest.jsonl").read_text().splitlines()}
    finished &= drawn(out).keys()  # without one that was recorded before the kill and not written yet
    before = {name: (out / name).stat().st_mtime_ns for name in finished}

    assert run([*words, str(out)], WRITE, second) == 0, said(second, 0, "stderr")
    assert before == {name: (out / name).stat().st_mtime_ns for name in finished}
    assert "12 of 12 prompts" not in said(second, 1)
    manifest = [json.loads(line)["file"] for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sorted(manifest) == sorted(drawn(out))
    assert main([*words, str(tmp_path / "alone")]) == 0
    assert drawn(tmp_path / "alone") == drawn(out)


def test_pictures_of_an_evaluation_are_shared_and_those_of_a_killed_process_drawn_on_resume(
    prompts: str, tiny_model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    out, first, second = (tmp_path / name for name in ("out", "first", "second"))
    words = ["evaluate", str(tiny_model_folder), "--images", str(photos), "--prompts", prompts, "--count=4", "--out"]
    assert run([*words, str(out)], WRITE, first, KILLED="0", LAST="4") != 0
    assert not (out / "report.json").exists()

    assert run([*words, str(out)], WRITE, second) == 0, said(second, 0, "stderr")
    for rank, finished in (("0", True), ("1", False)):
        assert ("FID" in said(second, int(rank))) == finished  # the first one measures
    assert main([*words, str(tmp_path / "alone")]) == 0
    for folder in ("from-prompts", "from-image-embeddings"):
        assert drawn(out / folder) == drawn(tmp_path / "alone" / folder)
    reports = [json.loads((folder / "report.json").read_text())["figures"] for folder in (out, tmp_path / "alone")]
    assert reports[0] == reports[1]
