"""Whether matrices in fewer bits draw as well as in float32: the bundled model each way, by the judge.

    PYTHONPATH=. .venv/bin/python benchmarks/precision.py [--prompts 200] [--first 0] [--kinds one two]
        [--device cpu] [--dtypes float32 float16 bfloat16 int8]

Every candidate is drawn in each type with the same numbers. Prints the share of candidates all right, and of best ones
of 16, the difference from the first type in points with its 95 % interval (the candidates of a prompt taken as one
draw), and how many pictures are the first's to the last byte. Leaves the JSON in results/, beside that of other kinds
and types. A GPU takes seconds where a CPU takes an hour, but rounds in its own way.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from clip_gen import ClipGen
from clip_gen.files import write_text_atomic
from clip_gen.hardware import supports_float16
from clip_gen.sampling.sampler import Sampling
from clip_gen.worlds.shapes.grading import CANDIDATES, TITLES, TOGETHER, Evaluation, Graded
from clip_gen.worlds.shapes.prompts import KINDS, cases

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {
    "cpu": ("float32", *(["float16"] if supports_float16() else []), "bfloat16", "int8"),
    "cuda": ("float32", "bfloat16"),
}


def each_way(models: dict[str, ClipGen], kind: str, first: int, prompts: int) -> dict[str, object]:
    """The shares of one kind of prompt, from number `first` on."""
    evaluations = [Evaluation(model, prompts, 0, Sampling()) for model in models.values()]
    chosen = cases(kind, first + prompts, 0)
    graded: list[tuple[Graded, ...]] = []
    for start in range(first, first + prompts, TOGETHER):
        some = chosen[start : start + TOGETHER]
        graded += zip(*(evaluation.candidates(some, start, "text") for evaluation in evaluations), strict=True)
    single = np.array([[np.mean(way.right) for way in ways] for ways in graded])
    best = np.array([[way.right[way.best(CANDIDATES)] for way in ways] for ways in graded], np.float64)
    same = np.mean([[same_pictures(ways[0], way) for way in ways] for ways in graded], axis=0)
    return {
        "prompts": prompts,
        "one candidate": compared(models, single),
        f"best of {CANDIDATES}": compared(models, best),
        "same pictures": dict(zip(models, same.round(4).tolist(), strict=True)),
    }


def same_pictures(first: Graded, second: Graded) -> float:
    return float(np.mean([a.tobytes() == b.tobytes() for a, b in zip(first.pictures, second.pictures, strict=True)]))


def compared(dtypes: Iterable[str], shares: np.ndarray) -> dict[str, dict[str, float]]:
    """Of shares (prompts, dtypes): the means, and by how many points each dtype is better than the first."""
    found = {}
    for dtype, column in zip(dtypes, shares.T, strict=True):
        difference = 100 * (column - shares[:, 0])
        within = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        values = {"share": column.mean(), "points": difference.mean(), "within": within}
        found[dtype] = {name: round(float(value), 4) for name, value in values.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, to go on behind an earlier run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["one", "two"])
    parser.add_argument("--device", choices=DTYPES, default="cpu", help="float16 and int8 are for CPUs alone")
    parser.add_argument("--dtypes", nargs="+", help="the others are compared with the first; by default all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "precision.json")
    arguments = parser.parse_args()
    folder, device = ROOT / "checkpoints" / "shapes", arguments.device
    models = {dtype: ClipGen.load(folder, device, dtype) for dtype in arguments.dtypes or DTYPES[device]}
    for kind in arguments.kinds:
        result = each_way(models, kind, arguments.first, arguments.prompts)
        title = f"{TITLES[kind]}, {' '.join(models)}, from number {arguments.first}"
        print(f"{title}\n{json.dumps(result, indent=1)}", flush=True)
        found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(arguments.out, json.dumps(found | {title: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
