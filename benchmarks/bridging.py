"""What each way over the gap between text and image embeddings is worth to the bundled model, by the judge.

    PYTHONPATH=. .venv/bin/python benchmarks/bridging.py --out /tmp/bridging [--prompts 100] [--kinds one two unsaid]
    PYTHONPATH=. .venv/bin/python benchmarks/bridging.py --out /tmp/bridging --noise 0 0.25 0.5 1

In use: mean shifts and guidance, beside the model as it is and beside image embeddings. In training: the last part of
the recipe again at each strength of noise, on what script/train-shapes left in runs/shapes.
Prints the shares all right of one candidate, of the best of 16 by CLIP and of a perfect ranker; leaves result.json, to
which a second run adds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from clip_gen import ClipGen
from clip_gen.config import BridgeConfig, read_config
from clip_gen.evaluation.prompts import KINDS
from clip_gen.evaluation.report import CANDIDATES, TITLES, Evaluation
from clip_gen.gpt import GPT
from clip_gen.sampling import Sampling
from clip_gen.training.shapes import Recipe, ShapesConfig

ROOT = Path(__file__).resolve().parent.parent
GUIDANCE = (1.5, 2.0, 3.0, 5.0)
MEAN_SHIFTS = (0.5, 1.0)
COLUMNS = ("best of 1", f"best of {CANDIDATES}", f"perfect ranker of {CANDIDATES}")


def ways_in_use(model: ClipGen) -> Iterator[tuple[str, str, Sampling]]:
    """A name, where embeddings come from, and how tokens are drawn; the model is changed while one is asked for."""
    yield "image embeddings", "image", Sampling()
    yield "as it is", "text", Sampling()
    for guidance in GUIDANCE:
        yield f"guidance {guidance}", "text", Sampling(guidance=guidance)
    for shift in MEAN_SHIFTS:
        model.bridge.config = BridgeConfig(mean_shift=shift)
        yield f"mean shift {shift}", "text", Sampling()
    model.bridge.config = model.config.bridge


def taken_further(recipe: Recipe, noise: float, out: Path) -> GPT:
    """The recipe's transformer as its last part leaves it, had conditions been pushed by up to `noise` in that."""
    recipe.config = replace(recipe.config, embedding_noise=noise)
    recipe.train_vague(out)
    return recipe.networks.gpt.eval().requires_grad_(False)


def graded(
    model: ClipGen, kind: str, source: str, sampling: Sampling, arguments: argparse.Namespace
) -> dict[str, float]:
    evaluation = Evaluation(model, arguments.prompts, arguments.seed, sampling)
    evaluation.grade(kind, source)
    name = TITLES[kind] if source == "text" else f"{TITLES[kind]}, from image embeddings"
    return {column: evaluation.rows[f"{name}, {column}"].value for column in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "shapes")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shapes.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "shapes", help="as script/train-shapes left it")
    parser.add_argument("--noise", type=float, nargs="+", help="train at these strengths instead")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["one"])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "result.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    model = ClipGen.load(arguments.model, arguments.device)

    def measure(way: str, source: str, sampling: Sampling) -> None:
        for kind in arguments.kinds:
            shares = graded(model, kind, source, sampling, arguments)
            found.setdefault(kind, {})[way] = shares
            print(f"{kind:8} {way:18} " + "  ".join(f"{column} {share:.0%}" for column, share in shares.items()))
            path.write_text(json.dumps(found | {"prompts": arguments.prompts}, indent=1) + "\n")

    if arguments.noise is None:
        for way, source, sampling in ways_in_use(model):
            measure(way, source, sampling)
        return
    for noise in arguments.noise:
        recipe = Recipe(read_config(arguments.config, ShapesConfig), arguments.work)
        for part in ("clip", "vqgan", "gpt"):
            recipe.part(part)
        gpt = taken_further(recipe, noise, arguments.out / f"noise-{noise}")
        model.gpt = gpt.to(model.device).work_in(model.gpt.dtype)
        measure(f"noise {noise}", "text", Sampling())
        measure(f"noise {noise}, image embeddings", "image", Sampling())


if __name__ == "__main__":
    main()
