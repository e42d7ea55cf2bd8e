"""Sampling with a row delay and without, in turn: CPU seconds on one thread, for several numbers of candidates.

    python -m benchmarks row-delay [--models FOLDER ...] [--delay 2] [--times 5] [--out row-delay.json]

The weights are those of the model folders, which may not have learnt the order: time does not depend on it. Only a
single candidate without a row delay is drawn in windows, and takes longer where guesses are wrong. Ratios are medians.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.figures import RESULTS, machine, markdown
from benchmarks.models import BUNDLED, EMOJI
from clip_gen import ClipGen
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Batch, Sampling, candidate_uniforms
from clip_gen.weights.model_folder import load_networks
from clip_gen.worlds.grading import world_of

CANDIDATES = (1, 4, 16)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks row-delay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", type=Path, default=[BUNDLED, EMOJI], help="model folders")
    parser.add_argument("--delay", type=int, default=2, help="positions; default 2")
    parser.add_argument("--times", type=int, default=5, help="prompts for each number of candidates; default 5")
    parser.add_argument("--out", type=Path, default=RESULTS / "row-delay.json", help="a JSON file")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    rows = [row for folder in arguments.models for row in measure(folder, arguments.delay, arguments.times)]
    facts = machine(torch.device("cpu")) | {"row_delay": arguments.delay, "times": arguments.times}
    arguments.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    print(markdown(rows, list(rows[0])))


def measure(folder: Path, delay: int, times: int) -> list[dict[str, object]]:
    model = ClipGen.load(folder, "cpu")
    delayed, rows = with_row_delay(folder, model.gpt.cache_dtype, delay), []
    cases = world_of(model, None).cases("one", times + 1, 0)
    for candidates in CANDIDATES:
        pairs = []
        for number, case in enumerate(cases):  # the first one warms up
            embedding = model.embed_prompt(case.prompt).expand(candidates, -1)
            pairs.append([seconds(gpt, embedding, number) for gpt in (model.gpt, delayed)])
        rows.append(
            {
                "model": model.config.name,
                "candidates": candidates,
                "seconds": round(median(plain for plain, _ in pairs[1:]), 3),
                "seconds with a row delay": round(median(other for _, other in pairs[1:]), 3),
                "times as fast": round(median(plain / other for plain, other in pairs[1:]), 2),
                "steps": len(delayed.steps.unique()),
            }
        )
    return rows


def with_row_delay(folder: Path, dtype: torch.dtype, delay: int) -> GPT:
    """A model's transformer with the same weights in the other order."""
    trained = load_networks(folder).gpt
    gpt = GPT(replace(trained.config, row_delay=delay))
    gpt.load_state_dict(trained.state_dict())
    return gpt.eval().requires_grad_(False).cast_for_inference(dtype)


def seconds(gpt: GPT, embedding: torch.Tensor, seed: int) -> float:
    uniforms = candidate_uniforms(seed, range(len(embedding)), gpt.config.block_size)
    began = time.process_time()
    Batch(gpt, embedding, uniforms, Sampling()).run()
    return time.process_time() - began
