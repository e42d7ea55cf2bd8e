"""What each way over the gap between text and image embeddings is worth to the bundled model, by the judge.

    PYTHONPATH=. .venv/bin/python benchmarks/bridging.py --out /tmp/bridging [--prompts 100] [--kinds one two unsaid]
    PYTHONPATH=. .venv/bin/python benchmarks/bridging.py --out /tmp/bridging --noise 0 0.25 0.5 1 [--from-nothing]

In use: mean shifts and guidance, beside the model as it is and beside image embeddings. In training: the model's
transformer goes on for --steps at each strength of noise, from the same weights, as the recipe trains it but
for the contrast with near misses; or new transformers of size laptop learn from the start, as those of own pictures do
but for blurred conditions.
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
import torch

from clip_gen import ClipGen
from clip_gen.config import BridgeConfig, read_config
from clip_gen.hardware import choose_dtype
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Sampling
from clip_gen.training.datasets import (
    EncodedPictures,
    Endless,
    encode_embeddings,
    encode_tokens,
    enough_places,
    find_neighbours,
)
from clip_gen.training.fit import fit
from clip_gen.training.gpt_trainer import GPTTrainer, start_from_codes
from clip_gen.training.plan import TrainSettings, plan
from clip_gen.weights.model_folder import load_networks
from clip_gen.weights.tarball import resolve_weights
from clip_gen.worlds.shapes.grading import CANDIDATES, TOGETHER, Evaluation
from clip_gen.worlds.shapes.pairs import RenderedPictures
from clip_gen.worlds.shapes.prompts import KINDS, cases
from clip_gen.worlds.shapes.recipe import ShapesConfig

ROOT = Path(__file__).resolve().parent.parent
FURTHER = {"learning_rate": 5e-4, "muon_rate": 2e-3, "ema_decay": 0.995}  # how the model's own transformer goes on
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


def trained(noise: float, arguments: argparse.Namespace) -> tuple[GPT, float]:
    """The model's transformer after so many steps more, or a new one's, its conditions pushed by up to `noise`; and
    nats a token on pictures never seen.
    """
    networks, config = load_networks(resolve_weights(arguments.model)), read_config(arguments.config, ShapesConfig)
    side, new = networks.config.vqgan.resolution, arguments.from_nothing
    out = arguments.out / f"{arguments.model.name}-{arguments.pictures}-{arguments.steps}{'-new' if new else ''}"

    def encoded(name: str, pictures: RenderedPictures, **options: float) -> EncodedPictures:
        embeddings = encode_embeddings(pictures, networks.clip, out / f"embeddings-{name}.npy")
        tokens = encode_tokens(pictures, networks.vqgan, out / f"tokens-{name}.npy")
        return EncodedPictures(
            embeddings, tokens, neighbours=find_neighbours(embeddings, 0, out / f"neighbours-{name}.npy", 0), **options
        )

    blur = 0.0 if new else config.condition_blur
    pictures = RenderedPictures(arguments.pictures, SEED, side)
    seen = encoded("seen", pictures, noise=noise, dropout=config.condition_dropout, blur=blur)
    unseen = encoded("unseen", RenderedPictures(256, SEED + 1, side))
    if new:
        codes = networks.config.vqgan.codebook_size
        settings = TrainSettings(size="laptop", codebook_size=codes, transformer_steps=arguments.steps)
        planned = plan(settings, networks.config, arguments.pictures)
        torch.manual_seed(0)
        gpt, fitting = GPT(planned.model.gpt), planned.transformer
        start_from_codes(gpt, networks.vqgan, 0)
        seen.places = enough_places(seen.tokens)
    else:
        gpt, fitting = networks.gpt, replace(config.gpt_fit, **FURTHER, steps=arguments.steps, compile=False)
    fitting = replace(fitting, validate_every=arguments.steps)
    trainer = GPTTrainer(gpt.train().requires_grad_(True), fitting)
    record = fit("gpt", trainer, Endless(seen, 0), unseen, out / f"noise-{noise}", seed=0)
    return gpt.eval().requires_grad_(False), record["val_loss"]


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
    parser.add_argument("--config", type=Path, default=ROOT / "clip_gen" / "configs" / "shapes.yaml")
    parser.add_argument("--noise", type=float, nargs="+", help="train at these strengths instead")
    parser.add_argument("--from-nothing", action="store_true", help="new transformers")
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
        gpt, nats = trained(noise, arguments)
        way = f"noise {noise}" + (" from nothing" if arguments.from_nothing else "")
        print(f"{way}: {nats:.4f} nats a token on pictures never seen")
        found.setdefault("nats", {})[way] = nats
        model.gpt = gpt.to(model.device).cast_for_inference(choose_dtype(None, model.device))
        measure(way, "text", Sampling())
        measure(f"{way}, image embeddings", "image", Sampling())


if __name__ == "__main__":
    main()
