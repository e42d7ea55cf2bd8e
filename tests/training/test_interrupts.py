"""training/interrupts.py: what ends a training."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cog_server import wait_for
from processes import command_lines, processes_of
from scripts import as_inputs

from clip_gen.__main__ import main
from clip_gen.files import ROOT


def words_of(photos: Path, base: Path, out: Path) -> list[str]:
    # From 1,000 steps on the networks are compiled first, which takes a minute.
    given = {"images": f"@{photos}", "base": base, "vqgan_steps": 999, "batch_size": 16}
    return [sys.executable, "-m", "clip_gen.serving.cli", "train", *as_inputs(given), "-o", str(out)]


def entries(out: Path) -> int:
    history = out / "work" / "vqgan" / "history.jsonl"
    return history.read_text().count("\n") if history.is_file() else 0


def numbers_of(words: str, out: Path) -> list[int]:
    """The processes that train into `out` whose command line has these words."""
    return [number for number, line in command_lines().items() if words in line and str(out) in line]


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A folder to train into. No training there outlives the test."""
    yield tmp_path / "out"
    for number in numbers_of("", tmp_path / "out"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


@pytest.mark.usefixtures("interruptible")
def test_a_training_survives_its_shell_and_keeps_others_out_of_its_folder(
    photos: Path, tiny_model_folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.join(words_of(photos, tiny_model_folder, out))
    command = ["bash", "-c", f"nohup {words} >/dev/null 2>&1 & sleep 1000"]
    shell = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    wait_for(lambda: entries(out) > 2, seconds=60)
    os.killpg(shell.pid, signal.SIGHUP)  # as when its terminal closes
    shell.wait()
    before = entries(out)
    wait_for(lambda: entries(out) > before + 1, seconds=60)
    assert main(["train", str(photos), "--out", str(out), "--base", str(tiny_model_folder)]) == 1
    printed = capsys.readouterr().err
    assert f"{out} is in use by another training; wait for it to end" in printed
    training = int(re.search(r"\(process (\d+) holds it\)", printed).group(1))
    assert training in numbers_of("-m clip_gen train ", out)
    os.kill(training, signal.SIGTERM)
    wait_for(lambda: not numbers_of("", out), seconds=30)
    assert (out / "work" / "vqgan" / "last.ckpt").is_file()


def test_a_training_that_watches_its_input_ends_with_it(photos: Path, tiny_model_folder: Path, out: Path) -> None:
    words = ["train", str(photos), "--out", str(out), "--base", str(tiny_model_folder), "--batch-size", "16"]
    command = [sys.executable, "-m", "clip_gen", *words, "--vqgan-steps", "999", "--watch-stdin"]
    training = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdin=subprocess.PIPE)
    wait_for(lambda: entries(out) > 0, seconds=60)
    training.stdin.close()
    assert training.wait(timeout=10) == -signal.SIGKILL
    wait_for(lambda: not processes_of(training.pid))
