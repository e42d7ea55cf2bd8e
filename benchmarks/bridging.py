"""What each way over the gap between text and image embeddings is worth to the bundled model, by the judge.

    PYTHONPATH=. .venv/bin/python benchmarks/bridging.py --out /tmp/bridging [--prompts 100] [--kinds one two unsaid]
    PYTHONPATH=. .venv/bin/python benchmarks/bridging.py --out /tmp/bridging --noise 0 0.25 0.5 1

In use: mean shifts and guidance, beside the model as it is and beside image embeddings. In training: the model's
transformer goes on for --steps at each strength of noise, from the same weights, as in the last part of the recipe but
for the contrast with near misses.
Prints the shares all right of a candidate taken blindly (and its 95 % interval either way), of the best of 16 by CLIP
and of a perfect ranker; leaves result.json, to which a second run adds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from clip_gen import ClipGen
from clip_gen.checkpoint import load_networks
from clip_gen.config import BridgeConfig, read_config
from clip_gen.evaluation.prompts import KINDS, cases
from clip_gen.evaluation.report import CANDIDATES, TOGETHER, Evaluation
from clip_gen.gpt import GPT
from clip_gen.pipeline import choose_dtype
from clip_gen.sampling import Sampling
from clip_gen.shapes.pairs import RenderedPictures
from clip_gen.training.dataset import EncodedPictures, Endless, encode_embeddings, encode_tokens, find_neighbours
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.run import fit
from clip_gen.training.shapes import ShapesConfig

ROOT = Path(__file__).resolve().parent.parent
GUIDANCE = (1.5, 2.0, 3.0, 5.0)
MEAN_SHIFTS = (0.5, 1.0)
SEED = 1_000_033  # of pictures that nothing else here is trained on or measured with


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


def taken_further(noise: float, arguments: argparse.Namespace) -> GPT:
    """The model's transformer after so many steps more, its conditions pushed by up to `noise`."""
    networks, config = load_networks(arguments.model), read_config(arguments.config, ShapesConfig)
    side = networks.config.vqgan.resolution
    out = arguments.out / f"{arguments.model.name}-{arguments.pictures}-{arguments.steps}"

    def encoded(name: str, pictures: RenderedPictures, **options: float) -> EncodedPictures:
        embeddings = encode_embeddings(pictures, networks.clip, out / f"embeddings-{name}.npy")
        tokens = encode_tokens(pictures, networks.vqgan, out / f"tokens-{name}.npy")
        return EncodedPictures(
            embeddings, tokens, neighbours=find_neighbours(embeddings, 0, out / f"neighbours-{name}.npy", 0), **options
        )

    chances = {"noise": noise, "dropout": config.condition_dropout, "blur": config.condition_blur}
    seen = encoded("seen", RenderedPictures(arguments.pictures, SEED, side), **chances)
    unseen = encoded("unseen", RenderedPictures(256, SEED + 1, side))
    fitting = replace(config.vague_fit, steps=arguments.steps, validate_every=arguments.steps, compile=False)
    gpt = networks.gpt.train().requires_grad_(True)
    fit("gpt", GPTTrainer(gpt, fitting), Endless(seen, 0), unseen, out / f"noise-{noise}", seed=0)
    return gpt.eval().requires_grad_(False)


def graded(
    model: ClipGen, kind: str, source: str, sampling: Sampling, arguments: argparse.Namespace
) -> dict[str, float]:
    evaluation = Evaluation(model, arguments.prompts, arguments.seed, sampling)
    chosen = cases(kind, arguments.prompts, arguments.seed)
    rows = []
    for start in range(0, len(chosen), TOGETHER):
        rows += evaluation.candidates(chosen[start : start + TOGETHER], start, source)
    blindly = np.array([np.mean(row.right) for row in rows])
    return {
        "blindly": float(blindly.mean()),
        "within": float(1.96 * blindly.std(ddof=1) / len(blindly) ** 0.5),
        f"best of {CANDIDATES}": float(np.mean([row.right[row.best(CANDIDATES)] for row in rows])),
        "perfect ranker": float(np.mean([any(row.right) for row in rows])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "shapes")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "shapes.yaml")
    parser.add_argument("--noise", type=float, nargs="+", help="train at these strengths instead")
    parser.add_argument("--steps", type=int, default=400, help="of those")
    parser.add_argument("--pictures", type=int, default=20_000, help="to learn from in them")
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
        model.gpt = taken_further(noise, arguments).to(model.device).work_in(choose_dtype(None, model.device))
        measure(f"noise {noise}", "text", Sampling())
        measure(f"noise {noise}, image embeddings", "image", Sampling())


if __name__ == "__main__":
    main()
