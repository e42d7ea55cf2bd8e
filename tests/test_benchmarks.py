"""benchmarks/: what measures the speed measures what it says, here on toy models."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bench
import busy
import figures
import numpy as np
import plain
import precision
import profiling
import pytest
import sampling
import serving
import torch
from conftest import FLOAT16, TINY
from figures import Figure
from PIL import Image
from subjects import PROMPT, PUBLISHED, ROOT, Subject, write_published
from torch import nn
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.config import GPTConfig
from clip_gen.hardware import supports_float16
from clip_gen.networks.float16_linear import Float16Linear
from clip_gen.networks.gpt import GPT
from clip_gen.networks.int8_linear import Int8Linear
from clip_gen.networks.kv_cache import SummedCache
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject(tiny_model_folder: Path) -> Subject:
    return Subject("bundled", tiny_model_folder, CPU, times=1)


# The plain reference does the same work


@pytest.mark.parametrize(
    "changes", [{"rotary": True}, {"head_bias": True, "null_condition": False}, {"looks_around": True}]
)
def test_the_plain_loop_draws_the_tokens_of_our_sampler(changes: dict[str, bool]) -> None:
    torch.manual_seed(0)
    gpt = GPT(replace(TINY.gpt, **changes)).eval().requires_grad_(False)
    for parameter in gpt.parameters():
        parameter.normal_(std=0.3)  # so that a token depends on those before it
    embedding, uniforms = F.normalize(torch.randn(4, 16), dim=1), candidate_uniforms(5, range(4), 16)
    tokens = plain.sample(gpt, embedding, uniforms)
    assert torch.equal(tokens, sample_tokens(gpt, embedding, uniforms, Sampling()))
    assert len(tokens.unique()) > 8


def test_plain_pictures_and_scores_are_ours(subject: Subject) -> None:
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    text = subject.ours.embed_prompt(PROMPT)
    for row, image, score in zip(tokens, *plain.look(subject.plain, tokens, text), strict=True):
        found, [cosine] = subject.ours.decode_and_score(row[None], text)
        assert torch.allclose(found[0], image, atol=1e-4)
        assert cosine == pytest.approx(float(score), abs=1e-4)


def test_a_plain_prediction_writes_the_pictures_of_ours(subject: Subject, tmp_path: Path) -> None:
    plain.predict(subject.plain, PROMPT, 7, tmp_path)
    ours = ClipGen.load(subject.folder, "cpu", "float32").generate(PROMPT, seed=7)
    for i, picture in enumerate(ours.images):
        difference = np.asarray(picture, int) - np.asarray(Image.open(tmp_path / f"out-{i}.png"), int)
        assert abs(difference).max() <= 1


def test_the_published_size_fits_together_and_its_random_model_predicts(tmp_path: Path) -> None:
    PUBLISHED.check()
    config = replace(TINY, vqgan=replace(TINY.vqgan, quantizer="taming"))
    folder = write_published(tmp_path / "published", config)
    assert len(ClipGen.load(folder, "cpu").generate(PROMPT, candidates=2, num_outputs=2, seed=0).images) == 2


# Measuring


def test_the_first_run_is_not_counted_and_the_least_of_the_others_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 1, 5, 10, 13, 20, 25])  # before and after each run
    monkeypatch.setattr(figures.time, "perf_counter", lambda: next(clock))
    assert figures.seconds(lambda: None, CPU, times=3) == 3


def test_a_ratio_is_plain_by_ours_and_a_bar_is_met_or_missed() -> None:
    figure = Figure("x", ours=0.5, plain=10.0, least_ratio=20)
    assert (figure.ratio, figure.met) == (20, True)
    assert replace(figure, least_ratio=21).met is False
    assert (Figure("x", 2.0, most_seconds=1.5).met, Figure("x", 1.5, most_seconds=1.5).met) == (False, True)
    assert (Figure("x", 2.0).ratio, Figure("x", 2.0).met) == (None, None)


def test_a_table_has_the_columns_that_are_used() -> None:
    rows = [Figure("sampling", 0.5, 10.0, least_ratio=40, hoped_ratio=60), Figure("saving", 0.25)]
    assert figures.table(rows).splitlines() == [
        "| what | ours | plain | ratio | bar |",
        "| --- | --- | --- | --- | --- |",
        "| sampling | 0.5 s | 10 s | 20.0× | 40× or more, 60× hoped for: MISSED |",
        "| saving | 0.25 s |  |  |  |",
    ]


def test_the_plain_loop_counts_every_length_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "seconds", lambda step, device, times: 1 + len(step.__defaults__[0][0]))
    gpt = GPT(TINY.gpt).eval()
    assert sampling.plain_seconds(gpt, CPU, batch=4, times=1) == sum(range(1, 17)) / 4


@pytest.mark.parametrize("part", ["sampling", "decoding", "loading", "prediction"])
def test_a_part_measures_both_ways(subject: Subject, part: str) -> None:
    for figure in bench.PARTS[part](subject):
        assert figure.ours > 0
        assert figure.ratio == figure.plain / figure.ours > 0


@pytest.mark.parametrize(("size", "bars"), [("bundled", []), ("published", [(13, 20), (40, 60)])])
@pytest.mark.parametrize("in_int8", [0.05, 0.2])
def test_sampling_at_the_published_size_has_bars_one_beside_the_best_batch(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, size: str, bars: list[tuple[int, int]], in_int8: float
) -> None:
    def our_seconds(gpt: GPT, device: torch.device, count: int, times: int) -> float:
        if count > 1:
            return 0.04
        return in_int8 if gpt.rows_apart else 0.1

    monkeypatch.setattr(sampling, "plain_seconds", lambda gpt, device, batch, times: {1: 3.0, 4: 2.0, 16: 2.5}[batch])
    monkeypatch.setattr(sampling, "our_seconds", our_seconds)
    found = {figure.name: figure for figure in sampling.measure(replace(subject, size=size))}
    ratios = {name: round(figure.ratio) for name, figure in found.items()}
    assert ratios == {
        "one candidate alone": 30,
        "one candidate alone, int8": round(3 / in_int8),
        "each of 16, plain in batches of 1": 75,
        "each of 16, plain in batches of 4": 50,
        "each of 16, plain in batches of 16": 62,
        "each of 16, int8": 50,
    }
    quickest = "one candidate alone" + (", int8" if in_int8 < 0.1 else "")
    barred = {name: (figure.least_ratio, figure.hoped_ratio) for name, figure in found.items() if figure.least_ratio}
    assert barred == dict(zip([quickest, "each of 16, plain in batches of 4"], bars, strict=bool(bars)))


@pytest.mark.parametrize("looks_around", [False, True])
def test_what_takes_the_time_of_drawing_is_found_for_any_transformer(looks_around: bool) -> None:
    gpt = GPT(replace(TINY.gpt, looks_around=looks_around)).eval()
    found = profiling.sampling_stages(gpt, CPU, times=1)
    assert list(found) == list(profiling.PROFILED)
    assert min(found.values()) >= 0 < found["matrix products"]


def test_the_profile_shares_out_a_prediction(subject: Subject) -> None:
    found = profiling.measure(subject)
    assert [figure.name for figure in found] == [
        "reading the prompt",
        *(f"sampling: {name}" for name in profiling.PROFILED),
        *("decoding", "ranking", "saving"),
    ]
    assert sum(figure.share for figure in found) == pytest.approx(1)
    assert all(figure.ours >= 0 for figure in found)


def summed_attention(x: torch.Tensor) -> torch.Tensor:
    config = GPTConfig(n_layer=1, n_head=4, n_embd=256, block_size=256)
    cache = SummedCache(config, len(x) // 4, device=CPU, dtype=torch.float16)
    cache.length = 255
    part = x.view(cache.rows, 4, -1)[:, :, :64]
    return [cache.attend(0, part, part, part) for _ in range(20)][-1]


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("matrix products", lambda x: F.linear(x, x)),
        ("matrix products", Int8Linear(nn.Linear(512, 512))),
        pytest.param(
            "matrix products", Float16Linear(nn.Linear(512, 512)) if supports_float16() else None, marks=FLOAT16
        ),
        ("attention", lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])),
        ("attention", lambda x: summed_attention(x)),
        ("normalisation and activation", lambda x: F.gelu(x)),
        (profiling.OTHER, lambda x: x + x),
        (profiling.REST, lambda x: time.sleep(0.1)),
    ],
)
def test_the_profiler_puts_operations_into_their_groups(name: str, work: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(512, 512)
    work(x)
    found = profiling.profiled_seconds(lambda: work(x))
    del found[profiling.REST if name != profiling.REST else profiling.OTHER]
    assert max(found, key=found.get) == name


def test_drawing_is_what_happens_while_a_token_is_drawn() -> None:
    def work() -> None:
        with torch.profiler.record_function(profiling.DRAWING):
            F.linear(torch.ones(512, 512), torch.ones(512, 512))

    found = profiling.profiled_seconds(work)
    assert found[profiling.DRAWING] > 0
    assert found["matrix products"] == 0


# Servers


def test_requests_at_once_are_compared_with_the_same_one_after_another() -> None:
    asked = []

    def ask(number: int) -> int:
        asked.append(number)
        time.sleep(0.02)
        return number

    figure = serving.at_once(ask, times=1)
    assert sorted(asked) == sorted([*range(8), *range(8)])
    assert figure.plain >= 8 * 0.02
    assert figure.ratio == figure.plain / figure.ours > 1


def test_an_answer_that_depends_on_the_others_is_an_error() -> None:
    asked = iter(range(100))
    with pytest.raises(RuntimeError, match="answered differently"):
        serving.at_once(lambda number: next(asked), times=1)


def test_on_a_gpu_answers_that_differ_are_counted(capsys: pytest.CaptureFixture) -> None:
    asked = iter(range(100))
    assert serving.at_once(lambda number: next(asked), times=1, exact=False).ratio > 0
    assert capsys.readouterr().out == "answers that differ from the first to the same request: 8 of 16\n"


def test_an_import_is_timed_beyond_an_empty_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serving.interpreter_seconds("import time; time.sleep(0.1)") > 0.1
    taken = {"pass": iter([0.02, 0.5, 0.02]), "import x": iter([9.0, 0.12, 0.12, 0.7])}
    monkeypatch.setattr(serving, "interpreter_seconds", lambda code: next(taken[code]))
    assert serving.import_seconds("import x", times=3) == pytest.approx(0.1)


def test_a_server_ends_with_all_its_processes() -> None:
    process = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; sleep 60 & echo; wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    process.stdout.readline()
    process.stdout.close()
    serving.end(process, patience=0.2)
    assert process.returncode == -9
    began = time.monotonic()
    while alive(process.pid) and time.monotonic() - began < 5:  # what is killed takes a moment to be gone
        time.sleep(0.02)
    assert not alive(process.pid)


def alive(group: int) -> list[str]:
    """Processes of the group that still run."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended while it was looked at
            states.append(path.read_text().rpartition(")")[2].split())
    return [state for state, _, of, *_ in states if int(of) == group and state != "Z"]


# Beside other processes


def test_drawing_beside_others_is_held_against_a_loop_beside_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(busy, "SETTLING", 0.0)
    monkeypatch.setattr(busy, "MULTIPLIES", "def work():\n    time.sleep(0.02)\n")
    monkeypatch.setattr(busy, "DRAWS", "def work():\n    return len(list(range(1000)))\n")
    out = tmp_path / "busy.json"
    words = ["--others", "1", "--repeats", "2", "--before", str(ROOT), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["busy", *words])
    busy.main()
    kept = json.loads(out.read_text())
    assert [row["others"] for row in kept["rows"]] == [0, 1]
    assert all(row["loop seconds"] >= 0.02 for row in kept["rows"])
    assert kept["same_pictures"]
    assert "| others | loop seconds | ours seconds | before seconds |" in capsys.readouterr().out


def test_the_bars_for_busy_machines() -> None:
    medians = {
        0: {"loop": 1.0, "ours": 0.9, "before": 0.75},
        2: {"loop": 2.0, "ours": 2.6, "before": 9.0},
        4: {"loop": 2.5, "ours": 3.6, "before": 9.0},
    }
    quiet, two, four = busy.rows(medians)
    assert (quiet["ours / before"], quiet["met"]) == (1.2, True)
    assert (two["ours: slowdown / loop's"], two["before: slowdown / loop's"], two["met"]) == (1.44, 6.0, True)
    assert (four["ours: slowdown / loop's"], four["met"]) == (1.6, False)


# What is left


def test_the_file_says_what_the_figures_hold_for_and_keeps_other_parts(tmp_path: Path) -> None:
    facts, path = figures.machine(CPU), tmp_path / "results" / "cpu.json"
    figures.keep(path, "http, bundled", facts, [Figure("old", 1.0)])
    figures.keep(path, "sampling, bundled", facts, [Figure("one", 0.5, 10.0, 40)])
    figures.keep(path, "http, bundled", facts, [Figure("new", 1.0)])
    found = json.loads(path.read_text())
    assert found["http, bundled"]["seconds"] == [{"name": "new", "ours": 1.0}]
    (row,) = found["sampling, bundled"]["seconds"]
    assert row == {"name": "one", "ours": 0.5, "plain": 10.0, "ratio": 20.0, "least_ratio": 40, "met": False}
    machine = found["sampling, bundled"]["machine"]
    assert machine["dtype"] in ("float32", "bfloat16", "float16")
    assert machine["threads"] == torch.get_num_threads()
    assert (machine["torch"], machine["cog"]) == (torch.__version__, "0.23.1")
    assert machine["device"] == "cpu"
    assert machine["processor"]
    assert machine["date"].startswith("20")


def test_a_run_prints_and_keeps_each_part(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "BUNDLED", tiny_model_folder)
    out = tmp_path / "mine.json"
    words = ["--device", "cpu", "--size", "bundled", "--only", "decoding", "loading", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["bench", *words])
    bench.main()
    assert list(json.loads(out.read_text())) == ["decoding, bundled", "loading, bundled"]
    printed = capsys.readouterr().out
    assert "processor: " in printed
    assert "| loading | " in printed


def test_results_are_named_after_what_they_were_measured_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setitem(bench.PARTS, "loading", lambda subject: [Figure("loading", 1.0)])
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--size", "bundled", "--only", "loading"])
    bench.main()
    out = tmp_path / f"{bench.file_name(figures.processor())}.json"
    assert capsys.readouterr().out.endswith(f"{out}\n")
    assert list(json.loads(out.read_text())) == ["loading, bundled"]


def test_what_is_measured_of_the_bundled_model_alone_is_refused_for_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--size", "published", "--only", "loading", "http"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "loading http: of the bundled model alone; leave out --size published" in capsys.readouterr().err


def test_the_readme_tells_of_every_file() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    names = [path.name for path in (ROOT / "benchmarks").glob("*.py")]
    assert not [name for name in names if f"`{name}`" not in text]
    assert os.access(ROOT / "script" / "bench", os.X_OK)


# What is said of quality


def test_precision_is_compared_candidate_by_candidate(tiny_model_folder: Path) -> None:
    models = {dtype: ClipGen.load(tiny_model_folder, "cpu", "float32") for dtype in ("float32", "bfloat16", "int8")}
    shares = precision.each_way(models, "one", 5, 3)
    assert shares["same pictures"] == {"float32": 1.0, "bfloat16": 1.0, "int8": 1.0}
    assert shares["one candidate"]["int8"]["points"] == shares["one candidate"]["int8"]["within"] == 0.0

    better = precision.compared(
        models, np.array([[0.5, 0.75, 0.5], [0.25, 0.25, 0.25], [0.5, 0.5, 0.5], [0.0, 0.25, 0.0]])
    )
    assert better["bfloat16"]["share"] == 0.4375
    assert better["bfloat16"]["points"] == 12.5
    assert better["bfloat16"]["within"] == pytest.approx(1.96 * np.std([25, 0, 0, 25], ddof=1) / 2, abs=1e-4)
    assert better["int8"]["points"] == 0
