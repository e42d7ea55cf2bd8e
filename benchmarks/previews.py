"""How much listening to the progress and previews slow down drawing.

    python -m benchmarks previews [--model FOLDER] [--runs 20] [--candidates 16] [--out previews.json]

Runs alternate, and each is compared with the plain run just before it, because other processes may slow down both.
The figures are medians of these ratios: of the seconds, and of the CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.figures import RESULTS, machine, markdown
from benchmarks.models import BUNDLED
from clip_gen import ClipGen, Generation
from clip_gen.sampling.progress import Progress

PROMPT = "a large red circle left of a small blue star on a white background"
MODES = {"plain": False, "progress": False, "previews": True}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks previews", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUNDLED, help="a model folder")
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "previews.json", help="a JSON file")
    arguments = parser.parse_args(words)
    model = ClipGen.load(arguments.model)
    rows = measure(model, arguments.runs, arguments.candidates)
    facts = machine(model.device) | {"runs": arguments.runs, "candidates": arguments.candidates}
    arguments.out.write_text(json.dumps({"machine": facts, "ratios": rows}, indent=1) + "\n")
    print(markdown(rows, list(rows[0])))


def measure(model: ClipGen, runs: int, candidates: int) -> list[dict[str, object]]:
    """A row for each kind of run but the plain one; the median seconds of a plain run are in each."""
    taken: dict[str, list[tuple[float, float, int]]] = {mode: [] for mode in MODES}
    plain = draw(model, candidates)
    for _ in range(runs):
        for mode, previews in MODES.items():
            heard: list[Progress] = []
            listening = {} if mode == "plain" else {"on_progress": heard.append, "previews": previews}
            began, cpu_began = time.perf_counter(), time.process_time()
            result = draw(model, candidates, **listening)
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            taken[mode].append((seconds, cpu_seconds, sum(one.preview is not None for one in heard[:-1])))
            if not torch.equal(result.tokens, plain.tokens):
                raise AssertionError(f"{mode}: the tokens differ from those of a plain run")
    return [row(mode, taken[mode], taken["plain"]) for mode in MODES if mode != "plain"]


def draw(model: ClipGen, candidates: int, **listening: Callable | bool) -> Generation:
    return model.generate(PROMPT, candidates=candidates, seed=7, **listening)


def row(mode: str, runs: list[tuple[float, float, int]], plain: list[tuple[float, float, int]]) -> dict[str, object]:
    pairs = list(zip(runs, plain, strict=True))
    return {
        "what": mode,
        "seconds, plain": round(median(seconds for seconds, _, _ in plain), 3),
        "seconds": round(median(seconds for seconds, _, _ in runs), 3),
        "ratio": round(median(ours[0] / theirs[0] for ours, theirs in pairs), 3),
        "ratio of CPU seconds": round(median(ours[1] / theirs[1] for ours, theirs in pairs), 3),
        "previews in a run": median(count for _, _, count in runs),
    }
