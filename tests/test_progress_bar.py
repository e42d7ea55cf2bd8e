"""progress_bar.py: a live line on a terminal, and a few lines in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from model_files import slow_folder

from clip_gen import progress_bar
from clip_gen.files import ROOT
from clip_gen.progress_bar import LiveBar, ProgressLog, log_line
from clip_gen.sampling.progress import Progress

# As replicate-python and replicate-javascript find them: in a line, from its start.
REPLICATE = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")


def written(progress: list[Progress], capsys: pytest.CaptureFixture[str]) -> list[str]:
    log = ProgressLog()
    for one in progress:
        log(one)
    return capsys.readouterr().err.splitlines()


def steps(seconds: float, count: int = 1000) -> list[Progress]:
    return [Progress(16 * i, 16 * count, seconds * i / count) for i in range(1, count + 1)]


def test_a_line_has_percent_speed_and_time_left_as_replicate_reads_them() -> None:
    line = log_line(Progress(1843, 4096, 4.2))
    assert line == " 45%|####4     | 1843/4096 tokens [00:04<00:05, 438.81 tokens/s]"
    assert REPLICATE.match(line).groups() == ("45", "1843", "4096")
    assert REPLICATE.match(log_line(Progress(16, 4096, 90.0)))
    assert "0.18 tokens/s" in log_line(Progress(16, 4096, 90.0))


def test_a_short_prediction_logs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = written([*steps(0.9), Progress(16000, 16000, 1.1)], capsys)
    assert line.startswith("100%|##########| 16000/16000 tokens [00:00<00:00, ")


def test_a_long_prediction_logs_its_start_and_every_twentieth(capsys: pytest.CaptureFixture[str]) -> None:
    lines = written(steps(1000), capsys)
    percents = [int(REPLICATE.match(line)[1]) for line in lines]
    assert percents[:4] == [0, 5, 10, 15]
    assert len(percents) == 21
    assert percents[-1] == 100


def test_only_the_last_line_says_100_percent(capsys: pytest.CaptureFixture[str]) -> None:
    lines = written([Progress(8000, 16000, 50.0), Progress(15990, 16000, 100.0), Progress(16000, 16000, 101.0)], capsys)
    assert [REPLICATE.match(line)[1] for line in lines] == ["50", "100"]


def test_lines_are_a_second_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(written(steps(5), capsys)) in (5, 6)


def on_terminal(folder: Path, *words: str) -> str:
    """What the command writes to a terminal of 80 columns."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "clip_gen", *words, "--out", str(folder)]
    with subprocess.Popen(command, env=environment, stdout=slave, stderr=slave, close_fds=True) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 1 << 16)
            except OSError:  # the command has ended
                break
    os.close(master)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(slow_folder(tmp_path_factory.mktemp("models") / "slow"))


def test_generate_shows_a_live_line_on_a_terminal_and_removes_it(model: str, tmp_path: Path) -> None:
    shown = on_terminal(tmp_path, "generate", "a star", "--model", model, "--candidates", "16")
    bars = re.findall(r"\r *(\d+)%\|[█▏▎▍▌▋▊▉ ]+\| \[(\d\d:\d\d)<(\d\d:\d\d), (\d+) tokens/s\]", shown)
    assert len(bars) > 1
    assert bars[-1][0] == "100"
    assert "\n" not in shown[shown.index("%|") : shown.rindex("%|")]
    assert shown[shown.rindex("]") + 1 :].lstrip("\r ").startswith(f"{tmp_path}/0.png")


def test_a_file_of_prompts_has_one_line_below_the_drawn_ones(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a star\na circle\na ring\n")
    words = ["generate", "--prompts-file", str(tmp_path / "prompts.txt"), "--model", model, "--candidates", "4"]
    shown = on_terminal(tmp_path, *words)
    assert re.search(r"100%\|█+\| \[[^]]+, 3 of 3 drawn, \d+ tokens/s\]", shown)
    for line in shown.splitlines():
        if ".0.png" in line:
            assert re.search(r"^.*\r *\r/\S+\.0\.png  score -?\d\.\d+  a \w+$|^/\S+\.0\.png ", line)
    assert shown.endswith("\r")  # the line was removed


def test_without_a_terminal_nothing_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveBar() as bar:
        assert bar.listener() is None
    assert capsys.readouterr().err == ""


def test_many_pictures_are_counted_every_half_minute_and_at_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now)
    with caplog.at_level("INFO"):
        log = progress_bar.CountLog("drawn", 1200, before=200)
        for number in range(1, 1001):
            now = 100 + number / 10
            log.advance(1)
    assert [record.getMessage() for record in caplog.records] == [
        "drawn: 200 of 1,200 were done before",
        "drawn: 500 of 1,200, 10.00 a second, 1.2 min left",
        "drawn: 800 of 1,200, 10.00 a second, 0.7 min left",
        "drawn: 1,100 of 1,200, 10.00 a second, 0.2 min left",
        "drawn: 1,200 of 1,200, 10.00 a second, 0.0 min left",
    ]
