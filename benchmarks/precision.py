"""Picture quality of the bundled model with weights in float16 and bfloat16, compared with float32.

    .venv/bin/python -m benchmarks precision [--prompts 200] [--kinds one two]
        [--device cpu] [--dtypes float32 float16 bfloat16]

All dtypes use the same random numbers. The judge grades the pictures. Prints the share of correct candidates and of
correct best ones of 16, the difference from the first dtype in percentage points with its 95 % interval (over prompts),
and the share of pictures that are identical to those of the first dtype. Adds the results to a JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.figures import RESULTS
from benchmarks.models import BUNDLED
from clip_gen import ClipGen
from clip_gen.files import write_text_atomic
from clip_gen.hardware import supports_float16
from clip_gen.sampling.sampler import Sampling
from clip_gen.worlds.grading import CANDIDATES, PROMPTS_PER_BATCH, Candidate, Evaluation, best_of
from clip_gen.worlds.shapes.grading import WORLD
from clip_gen.worlds.shapes.prompts import KINDS, TITLES, cases

DTYPES = {
    "cpu": ("float32", *(["float16"] if supports_float16() else []), "bfloat16"),
    "cuda": ("float32", "bfloat16"),
}


def measure(models: dict[str, ClipGen], kind: str, prompts: int) -> dict[str, object]:
    """The shares for one kind of prompt, by dtype."""
    evaluations = [Evaluation(WORLD, model, prompts, 0, Sampling()) for model in models.values()]
    chosen = cases(kind, prompts, 0)
    graded: list[tuple[list[Candidate], ...]] = []
    for start in range(0, prompts, PROMPTS_PER_BATCH):
        some = chosen[start : start + PROMPTS_PER_BATCH]
        graded += zip(*(evaluation.candidates(some, start, "text") for evaluation in evaluations), strict=True)
    single = np.array([[np.mean([candidate.right for candidate in way]) for way in ways] for ways in graded])
    best = np.array([[best_of(way).right for way in ways] for ways in graded], np.float64)
    same = np.mean([[same_pictures(ways[0], way) for way in ways] for ways in graded], axis=0)
    return {
        "prompts": prompts,
        "one candidate": compared(models, single),
        f"best of {CANDIDATES}": compared(models, best),
        "same pictures": dict(zip(models, same.round(4).tolist(), strict=True)),
    }


def same_pictures(first: list[Candidate], second: list[Candidate]) -> float:
    pairs = zip(first, second, strict=True)
    return float(np.mean([one.picture.tobytes() == other.picture.tobytes() for one, other in pairs]))


def compared(dtypes: Iterable[str], shares: np.ndarray) -> dict[str, dict[str, float]]:
    """For shares (prompts, dtypes): means, and by how many points each dtype is better than the first."""
    found = {}
    for dtype, column in zip(dtypes, shares.T, strict=True):
        difference = 100 * (column - shares[:, 0])
        within = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        values = {"share": column.mean(), "points": difference.mean(), "within": within}
        found[dtype] = {name: round(float(value), 4) for name, value in values.items()}
    return found


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=200, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["one", "two"])
    parser.add_argument("--device", choices=DTYPES, default="cpu", help="float16 is for CPUs only")
    parser.add_argument("--dtypes", nargs="+", help="each is compared with the first; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    arguments = parser.parse_args(words)
    device = arguments.device
    models = {dtype: ClipGen.load(BUNDLED, device, dtype) for dtype in arguments.dtypes or DTYPES[device]}
    for kind in arguments.kinds:
        result = measure(models, kind, arguments.prompts)
        title = f"{TITLES[kind]}, {' '.join(models)}, from number 0"
        print(f"{title}\n{json.dumps(result, indent=1)}", flush=True)
        found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(arguments.out, json.dumps(found | {title: result}, indent=1) + "\n")
