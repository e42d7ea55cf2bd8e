"""Whether matrices in bfloat16 draw as well as in float32: the bundled model both ways, by the judge.

    PYTHONPATH=. .venv/bin/python benchmarks/precision.py [--prompts 200] [--kinds one two] [--out FILE]

Every candidate is drawn twice with the same numbers. Prints the share of candidates all right, and of best ones of 16,
each way, the difference in points with its 95 % interval (the candidates of a prompt taken as one draw), and how many
pictures are the same to the last byte. Leaves the JSON in results/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from clip_gen import ClipGen
from clip_gen.evaluation.prompts import KINDS, cases
from clip_gen.evaluation.report import CANDIDATES, TITLES, TOGETHER, Evaluation, Graded
from clip_gen.files import whole_or_not
from clip_gen.sampling import Sampling

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "bfloat16")


def both_ways(models: dict[str, ClipGen], kind: str, prompts: int) -> dict[str, object]:
    """The shares of one kind of prompt."""
    evaluations = [Evaluation(models[dtype], prompts, 0, Sampling()) for dtype in DTYPES]
    chosen = cases(kind, prompts, 0)
    graded: list[tuple[Graded, ...]] = []
    for start in range(0, prompts, TOGETHER):
        some = chosen[start : start + TOGETHER]
        graded += zip(*(evaluation.candidates(some, start, "text") for evaluation in evaluations), strict=True)
    single = np.array([[np.mean(row.right) for row in pair] for pair in graded])
    best = np.array([[row.right[row.best(CANDIDATES)] for row in pair] for pair in graded], np.float64)
    same = np.mean([same_pictures(*pair) for pair in graded])
    return {"one candidate": compared(single), f"best of {CANDIDATES}": compared(best), "same pictures": float(same)}


def same_pictures(first: Graded, second: Graded) -> float:
    return float(np.mean([a.tobytes() == b.tobytes() for a, b in zip(first.pictures, second.pictures, strict=True)]))


def compared(shares: np.ndarray) -> dict[str, float]:
    """Of shares (prompts, 2), one for each dtype: both means, and by how many points the second is better."""
    difference = 100 * (shares[:, 1] - shares[:, 0])
    within = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    values = dict(zip(DTYPES, shares.mean(axis=0), strict=True)) | {"points": difference.mean(), "within": within}
    return {name: round(float(value), 4) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["one", "two"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "precision.json")
    arguments = parser.parse_args()
    models = {dtype: ClipGen.load(ROOT / "checkpoints" / "shapes", "cpu", dtype) for dtype in DTYPES}
    result = {}
    for kind in arguments.kinds:
        result[TITLES[kind]] = both_ways(models, kind, arguments.prompts)
        print(f"{TITLES[kind]}, {arguments.prompts} prompts", json.dumps(result[TITLES[kind]], indent=1), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_not(arguments.out) as temporary:
        Path(temporary).write_text(json.dumps({"prompts": arguments.prompts, "shares": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
