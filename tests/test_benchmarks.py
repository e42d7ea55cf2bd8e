"""benchmarks/ with tiny models."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch.nn import functional as F

from benchmarks import busy_machine, figures, precision, reference, server_speed, speed, token_speed
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.figures import Figure
from benchmarks.models import BUNDLED, PROMPT, PUBLISHED, Subject, write_published
from clip_gen import ClipGen
from clip_gen.files import ROOT
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject(tiny_model_folder: Path) -> Subject:
    return Subject("bundled", tiny_model_folder, CPU, times=1)


# The plain reference does the same work


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary": True},
        {"head_bias": True, "null_condition": False},
        {"neighbour_context": True, "sketch_drawings": 2},
    ],
)
def test_the_reference_samples_the_same_tokens(changes: dict[str, bool]) -> None:
    torch.manual_seed(0)
    gpt = GPT(replace(TINY.gpt, **changes)).eval().requires_grad_(False)
    for parameter in gpt.parameters():
        parameter.normal_(std=0.3)  # so that tokens depend on earlier ones
    embedding, uniforms = F.normalize(torch.randn(4, 16), dim=1), candidate_uniforms(5, range(4), 16)
    tokens = sample_tokens(gpt, embedding, uniforms, Sampling())
    assert torch.equal(reference.sample(gpt, embedding, uniforms), tokens)
    assert torch.equal(reference.sample_without_cache(gpt, embedding, uniforms), tokens)
    compiled = torch.compile(reference.cached_blocks, backend="eager", fullgraph=True)
    assert torch.equal(reference.sample(gpt, embedding, uniforms, compiled), tokens)
    assert len(tokens.unique()) > 8


def test_the_reference_gives_the_same_images_and_scores(subject: Subject) -> None:
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    text = subject.ours.embed_prompt(PROMPT)
    for row, image, score in zip(tokens, *reference.decode_and_score(subject.plain, tokens, text), strict=True):
        found, [cosine] = subject.ours.decode_and_score(row[None], text)
        assert torch.allclose(found[0], image, atol=1e-4)
        assert cosine == pytest.approx(float(score), abs=1e-4)


def test_the_reference_writes_the_same_files(subject: Subject, tmp_path: Path) -> None:
    reference.predict(subject.plain, PROMPT, 7, tmp_path)
    ours = ClipGen.load(subject.folder, "cpu", "float32").generate(PROMPT, seed=7)
    for i, picture in enumerate(ours.images):
        difference = np.asarray(picture, int) - np.asarray(Image.open(tmp_path / f"out-{i}.png"), int)
        assert abs(difference).max() <= 1


def test_a_random_model_of_the_published_size_predicts(tmp_path: Path) -> None:
    PUBLISHED.check()
    config = replace(TINY, vqgan=replace(TINY.vqgan, quantizer="taming"))
    folder = write_published(tmp_path / "published", config)
    assert len(ClipGen.load(folder, "cpu").generate(PROMPT, candidates=2, num_outputs=2, seed=0).images) == 2


# Measuring


def test_seconds_are_the_minimum_without_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 1, 5, 10, 13, 20, 25])  # before and after each run
    monkeypatch.setattr(figures.time, "perf_counter", lambda: next(clock))
    assert figures.seconds(lambda: None, CPU, times=3) == 3


def test_ratios_and_targets_of_figures() -> None:
    figure = Figure("x", ours=0.5, plain=10.0, min_ratio=20)
    assert (figure.ratio, figure.met) == (20, True)
    assert replace(figure, min_ratio=21).met is False
    assert (Figure("x", 2.0, max_seconds=1.5).met, Figure("x", 1.5, max_seconds=1.5).met) == (False, True)
    assert (Figure("x", 2.0).ratio, Figure("x", 2.0).met) == (None, None)


def test_a_table_has_no_empty_columns() -> None:
    rows = [Figure("sampling", 0.5, 10.0, min_ratio=40), Figure("saving", 0.25)]
    assert figures.table(rows).splitlines() == [
        "| what | ours | plain | ratio | target |",
        "| --- | --- | --- | --- | --- |",
        "| sampling | 0.5 s | 10 s | 20.0× | 40× or more: MISSED |",
        "| saving | 0.25 s |  |  |  |",
    ]


def test_a_table_has_a_column_for_each_slower_reference() -> None:
    rows = [Figure("sampling", 0.5, 1.0, max_seconds=1, others={"without a cache": 10.0}), Figure("saving", 0.25)]
    assert figures.table(rows).splitlines() == [
        "| what | ours | plain | ratio | plain, without a cache | target |",
        "| --- | --- | --- | --- | --- | --- |",
        "| sampling | 0.5 s | 1 s | 2.0× | 10 s, 20.0× | at most 1 s: met |",
        "| saving | 0.25 s |  |  |  |  |",
    ]


def test_seconds_of_the_reference_sum_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_speed, "seconds", lambda step, device, times: 1 + len(step.__defaults__[0][0]))
    gpt = GPT(TINY.gpt).eval()
    assert token_speed.seconds_without_cache(gpt, CPU, batch=4, times=1) == sum(range(1, 17)) / 4


@pytest.mark.parametrize("part", ["sampling", "decoding", "loading", "prediction"])
def test_sampling_and_decoding_measure_ours_and_the_reference(subject: Subject, part: str) -> None:
    for figure in speed.PARTS[part](subject):
        assert figure.ours > 0
        assert figure.ratio == figure.plain / figure.ours > 0


def test_sampling_is_compared_with_the_loop_with_a_cache_first(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, uncached = {1: 0.3, 4: 0.2, 16: 0.25}, {1: 3.0, 4: 2.0, 16: 2.5}
    monkeypatch.setattr(token_speed, "plain_seconds", lambda gpt, device, batch, times: cached[batch])
    monkeypatch.setattr(token_speed, "seconds_without_cache", lambda gpt, device, batch, times: uncached[batch])
    monkeypatch.setattr(token_speed, "our_seconds", lambda gpt, device, count, times: 0.04 if count > 1 else 0.1)
    found = {figure.name: figure for figure in token_speed.measure(subject)}
    assert {name: (round(figure.ratio, 1), figure.others) for name, figure in found.items()} == {
        "a single candidate": (3, {"without a cache": 3.0}),
        "each of 16, plain in batches of 1": (7.5, {"without a cache": 3.0}),
        "each of 16, plain in batches of 4": (5, {"without a cache": 2.0}),
        "each of 16, plain in batches of 16": (6.2, {"without a cache": 2.5}),
    }


# Servers


def test_concurrent_requests_are_compared_with_sequential_ones() -> None:
    asked = []

    def ask(number: int) -> int:
        asked.append(number)
        time.sleep(0.02)
        return number

    figure = server_speed.at_once(ask, times=1)
    assert sorted(asked) == sorted([*range(8), *range(8)])
    assert figure.plain >= 8 * 0.02
    assert figure.ratio == figure.plain / figure.ours > 1


def test_an_answer_that_depends_on_other_requests_is_an_error() -> None:
    asked = iter(range(100))
    with pytest.raises(RuntimeError, match="answered differently"):
        server_speed.at_once(lambda number: next(asked), times=1)


def test_on_a_gpu_answers_that_differ_are_counted(capsys: pytest.CaptureFixture) -> None:
    asked = iter(range(100))
    assert server_speed.at_once(lambda number: next(asked), times=1, exact=False).ratio > 0
    assert capsys.readouterr().out == "answers that differ from the first to the same request: 8 of 16\n"


def test_import_seconds_exclude_the_start_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_speed.interpreter_seconds("import time; time.sleep(0.1)") > 0.1
    taken = {"pass": iter([0.02, 0.5, 0.02]), "import x": iter([9.0, 0.12, 0.12, 0.7])}
    monkeypatch.setattr(server_speed, "interpreter_seconds", lambda code: next(taken[code]))
    assert server_speed.import_seconds("import x", times=3) == pytest.approx(0.1)


def test_a_server_ends_with_all_its_processes() -> None:
    process = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; sleep 60 & echo; wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    process.stdout.readline()
    process.stdout.close()
    server_speed.terminate(process, patience=0.2)
    assert process.returncode == -9
    began = time.monotonic()
    while alive(process.pid) and time.monotonic() - began < 5:  # killed processes take a moment to end
        time.sleep(0.02)
    assert not alive(process.pid)


def alive(group: int) -> list[str]:
    """Running processes of the group."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            states.append(path.read_text().rpartition(")")[2].split())
    return [state for state, _, of, *_ in states if int(of) == group and state != "Z"]


# Beside other processes


def test_the_slowdown_is_compared_with_that_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(busy_machine, "SETTLING", 0.0)
    monkeypatch.setattr(busy_machine, "MULTIPLIES", "def work():\n    time.sleep(0.02)\n")
    monkeypatch.setattr(busy_machine, "DRAWS", "def work():\n    return len(list(range(1000)))\n")
    out = tmp_path / "busy.json"
    words = ["--others", "1", "--repeats", "2", "--before", str(ROOT), "--out", str(out)]
    main(["busy-machine", *words])
    kept = json.loads(out.read_text())
    assert [row["others"] for row in kept["rows"]] == [0, 1]
    assert all(row["loop seconds"] >= 0.02 for row in kept["rows"])
    assert kept["same_pictures"]
    assert "| others | loop seconds | ours seconds | before seconds |" in capsys.readouterr().out


def test_targets_of_busy_machine() -> None:
    medians = {
        0: {"loop": 1.0, "ours": 0.9, "before": 0.75},
        2: {"loop": 2.0, "ours": 2.6, "before": 9.0},
        4: {"loop": 2.5, "ours": 3.6, "before": 9.0},
    }
    quiet, two, four = busy_machine.rows(medians)
    assert (quiet["ours / before"], quiet["met"]) == (1.2, True)
    assert (two["ours: slowdown / loop's"], two["before: slowdown / loop's"], two["met"]) == (1.44, 6.0, True)
    assert (four["ours: slowdown / loop's"], four["met"]) == (1.6, False)


# Results


def test_saved_figures_name_the_machine_and_keep_other_parts(tmp_path: Path) -> None:
    facts, path = figures.machine(CPU), tmp_path / "results" / "cpu.json"
    figures.save(path, "http, bundled", facts, [Figure("old", 1.0)])
    figures.save(path, "sampling, bundled", facts, [Figure("one", 0.5, 10.0, 40)])
    figures.save(path, "http, bundled", facts, [Figure("new", 1.0)])
    found = json.loads(path.read_text())
    assert found["http, bundled"]["seconds"] == [{"name": "new", "ours": 1.0}]
    (row,) = found["sampling, bundled"]["seconds"]
    assert row == {"name": "one", "ours": 0.5, "plain": 10.0, "ratio": 20.0, "min_ratio": 40, "met": False}
    machine = found["sampling, bundled"]["machine"]
    assert machine["dtype"] in ("float32", "bfloat16", "float16")
    assert machine["threads"] == torch.get_num_threads()
    assert (machine["torch"], machine["cog"]) == (torch.__version__, "0.23.1")
    assert machine["device"] == "cpu"
    assert machine["processor"]
    assert machine["date"].startswith("20")


def test_a_run_prints_and_saves_each_part(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(speed, "BUNDLED", tiny_model_folder)
    out = tmp_path / "mine.json"
    words = ["--device", "cpu", "--size", "bundled", "--only", "decoding", "loading", "--out", str(out)]
    main(["speed", *words])
    assert list(json.loads(out.read_text())) == ["decoding, bundled", "loading, bundled"]
    printed = capsys.readouterr().out
    assert "processor: " in printed
    assert "| loading | " in printed


def test_result_files_are_named_after_the_hardware(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setitem(speed.PARTS, "loading", lambda subject: [Figure("loading", 1.0)])
    main(["speed", "--device", "cpu", "--size", "bundled", "--only", "loading"])
    out = tmp_path / f"{speed.file_name(figures.processor())}.json"
    assert capsys.readouterr().out.endswith(f"{out}\n")
    assert list(json.loads(out.read_text())) == ["loading, bundled"]


def test_parts_for_the_bundled_model_are_refused_for_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["speed", "--size", "published", "--only", "loading", "http"])
    assert "loading http: measures the bundled model only; leave out --size published" in capsys.readouterr().err


def test_the_documentation_names_every_benchmark() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert not [name for name in BENCHMARKS if f"python -m benchmarks {name}" not in text]
    assert os.access(ROOT / "script" / "bench", os.X_OK)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_memory_of_all_metrics_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    main(["metrics-memory", "--pictures", "70", "--features", "16", "--out", str(out)])
    row = json.loads(out.read_text())["row"]
    assert row["metrics"] == 11  # FID, KID, CMMD, IS; precision, recall, density, coverage; copies; two of prompts
    assert 0 < row["GB at the start"] <= row["GB at the peak"]


# Quality


def test_precision_compares_candidate_by_candidate(tiny_model_folder: Path) -> None:
    models = {dtype: ClipGen.load(tiny_model_folder, "cpu", "float32") for dtype in ("float32", "float16", "bfloat16")}
    shares = precision.measure(models, "one", 3)
    assert shares["same pictures"] == {"float32": 1.0, "float16": 1.0, "bfloat16": 1.0}
    assert shares["one candidate"]["bfloat16"]["points"] == shares["one candidate"]["bfloat16"]["within"] == 0.0

    better = precision.compared(
        models, np.array([[0.5, 0.75, 0.5], [0.25, 0.25, 0.25], [0.5, 0.5, 0.5], [0.0, 0.25, 0.0]])
    )
    assert better["float16"]["share"] == 0.4375
    assert better["float16"]["points"] == 12.5
    assert better["float16"]["within"] == pytest.approx(1.96 * np.std([25, 0, 0, 25], ddof=1) / 2, abs=1e-4)
    assert better["bfloat16"]["points"] == 0


def test_a_row_delay_is_timed_with_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["row-delay", "--models", str(BUNDLED), "--times", "1", "--out", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["candidates"], row["steps"]) for row in rows] == [(1, 46), (4, 46), (16, 46)]
    assert rows[1]["times as fast"] > 1.2
    assert "| shapes | 16 | " in capsys.readouterr().out


def test_windows_and_single_steps_draw_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["windows", "--models", str(BUNDLED), "--pictures", "2", "--out", str(tmp_path / "windows.json")])
    (row,) = json.loads((tmp_path / "windows.json").read_text())["models"]
    assert (row["model"], row["pictures"], row["same tokens"]) == ("shapes", 2, 2)
    assert 256 / 8 <= row["steps"] < 256
    assert row["by CPU seconds"] > 1
    assert "| shapes | " in capsys.readouterr().out
