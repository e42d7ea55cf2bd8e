"""A single candidate in windows and in single steps: the same tokens, and how much faster, from prompt to file.

    python -m benchmarks windows [--models FOLDER ...] [--pictures 20] [--out windows.json]

Both ways draw each prompt, in turn, in one process. The ratios are medians over the prompts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.figures import RESULTS, machine, markdown
from benchmarks.models import BUNDLED, EMOJI
from clip_gen import ClipGen
from clip_gen.sampling import sampler
from clip_gen.worlds.grading import world_of

WINDOWS = sampler.window_length
KINDS = ("one", "two")  # of prompts, in turn


class Drawn(NamedTuple):
    tokens: Tensor
    seconds: float
    cpu_seconds: float
    steps: int


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks windows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", type=Path, default=[BUNDLED, EMOJI], help="model folders")
    parser.add_argument("--pictures", type=int, default=20, help="of each model, both ways; default 20")
    parser.add_argument("--out", type=Path, default=RESULTS / "windows.json", help="a JSON file")
    arguments = parser.parse_args(words)
    rows = [measure(ClipGen.load(folder, "cpu"), arguments.pictures) for folder in arguments.models]
    facts = machine(torch.device("cpu")) | {"pictures": arguments.pictures}
    arguments.out.write_text(json.dumps({"machine": facts, "models": rows}, indent=1) + "\n")
    print(markdown(rows, list(rows[0])))


def measure(model: ClipGen, count: int) -> dict[str, object]:
    cases = [world_of(model, None).cases(kind, count, 0) for kind in KINDS]
    pairs = []
    draw(model, cases[0][0].prompt, 0, WINDOWS)  # warm
    for number in range(count):
        prompt = cases[number % len(KINDS)][number].prompt
        pairs.append([draw(model, prompt, number, how) for how in (one_step, WINDOWS)])
    single, windows = zip(*pairs, strict=True)
    return {
        "model": model.config.name,
        "seconds in single steps": round(median(drawn.seconds for drawn in single), 3),
        "seconds in windows": round(median(drawn.seconds for drawn in windows), 3),
        "times as fast": round(median(one.seconds / other.seconds for one, other in pairs), 2),
        "by CPU seconds": round(median(one.cpu_seconds / other.cpu_seconds for one, other in pairs), 2),
        "steps": median(drawn.steps for drawn in windows),
        "tokens": model.config.gpt.block_size,
        "pictures": count,
        "same tokens": sum(torch.equal(one.tokens, other.tokens) for one, other in pairs),
    }


def one_step(*given: object) -> int:
    return 1


def draw(model: ClipGen, prompt: str, seed: int, window_length: Callable[..., int]) -> Drawn:
    steps, take_step = 0, sampler.Batch.step

    def counted(batch: sampler.Batch) -> None:
        nonlocal steps
        steps += 1
        take_step(batch)

    sampler.window_length, sampler.Batch.step = window_length, counted
    try:
        with tempfile.TemporaryDirectory() as folder:
            began, cpu_began = time.perf_counter(), time.process_time()
            result = model.generate(prompt, candidates=1, num_outputs=1, seed=seed)
            result.images[0].save(Path(folder) / "0.png")
            return Drawn(result.tokens, time.perf_counter() - began, time.process_time() - cpu_began, steps)
    finally:
        sampler.window_length, sampler.Batch.step = WINDOWS, take_step
