"""Two choices of the training, measured side by side: the quantiser, and CLIP-GEN's second loss.

    PYTHONPATH=. .venv/bin/python benchmarks/choices.py quantizer --out /tmp/quantizer [--steps 1500]
    (the same with) second_loss --out /tmp/second --model checkpoints/shapes [--steps 600]

Both learn from the same 2,000 plain shapes, in the same order, for the same number of steps.
quantizer: stage 1 of size laptop with taming's codebook and with the l2-normalised one; PSNR, the share of codes used
and the judge's word on reconstructions of pictures never seen.
second_loss: stage 2 anew on the model's VQGAN and CLIP, with the second loss at several weights; the token loss on
pictures never seen, and how near CLIP finds what is drawn from their embeddings. --further: from the model's
transformer instead. Leaves result.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from clip_gen.images import from_bytes, to_pil
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens
from clip_gen.training.datasets import EncodedPictures, Endless, encode_embeddings, encode_tokens
from clip_gen.training.fit import fit
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.losses import psnr
from clip_gen.training.plan import SIZES
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.model_folder import Networks, load_networks
from clip_gen.weights.tarball import resolve_weights
from clip_gen.worlds.shapes.captions import describe
from clip_gen.worlds.shapes.judge import read, satisfies
from clip_gen.worlds.shapes.pairs import RenderedPictures, training_rng
from clip_gen.worlds.shapes.scenes import sample_scene

PICTURES, UNSEEN = RenderedPictures(2000, 4, 64), RenderedPictures(500, 1_000_003, 64)


class Again(torch.utils.data.Dataset):
    """The pictures over and over, as a training without crops and flips has them."""

    def __getitem__(self, number: int) -> np.ndarray:
        return PICTURES[number % len(PICTURES)]


def quantizer(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    results = {}
    for kind in arguments.quantizers:
        config = replace(SIZES["laptop"][0], quantizer=kind, codebook_size=512, codebook_dim=8)
        torch.manual_seed(0)
        fitting = FitConfig(arguments.steps, 32, 1e-3, weight_decay=0.0, ema_decay=0.998, compile=arguments.compile)
        trainer = VQGANTrainer(VQGAN(config).train(), fitting)
        record = fit(kind, trainer, Again(), UNSEEN, arguments.out / kind, seed=0)
        results[kind] = {"minutes": record["minutes"], **reconstructions(trainer.vqgan.eval())}
        print(kind, results[kind], flush=True)
    return results


@torch.inference_mode()
def reconstructions(vqgan: VQGAN) -> dict[str, float]:
    found, used, right = [], set(), []
    for start in range(0, len(UNSEEN), 50):
        images = from_bytes(torch.stack([torch.from_numpy(UNSEEN[i]) for i in range(start, start + 50)]))
        tokens = vqgan.encode(images)
        decoded = vqgan.decode(tokens)
        found += psnr(decoded, images).tolist()
        used |= set(tokens.unique().tolist())
        for i, picture in enumerate(to_pil(decoded), start):
            scene = sample_scene(training_rng(UNSEEN.seed, i))
            right.append(satisfies(read(np.asarray(picture)), describe(scene)))
    codes_used = len(used) / vqgan.config.codebook_size
    return {"psnr": float(np.mean(found)), "codes_used": codes_used, "judged_right": float(np.mean(right))}


def second_loss(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    networks, results = load_networks(resolve_weights(arguments.model)), {}
    learnt, unseen = (
        EncodedPictures(
            encode_embeddings(pictures, networks.clip, arguments.out / f"embeddings-{name}.npy"),
            encode_tokens(pictures, networks.vqgan, arguments.out / f"tokens-{name}.npy"),
            noise=0.5,
            dropout=0.1,
        )
        for name, pictures in (("learnt", PICTURES), ("unseen", UNSEEN))
    )
    for weight in arguments.weights:
        torch.manual_seed(0)
        rate = 5e-4 if arguments.further else 1.5e-3
        fitting = FitConfig(arguments.steps, 32, rate, 4 * rate, warmup=20, weight_decay=0.05, ema_decay=0.998)
        gpt = GPT(networks.config.gpt).train()
        if arguments.further:
            gpt.load_state_dict(networks.gpt.state_dict())
        parts = {"embedding_loss": weight, "vqgan": networks.vqgan, "clip": networks.clip}
        began = time.monotonic()
        trainer = GPTTrainer(gpt, fitting, **parts)
        record = fit("gpt", trainer, Endless(learnt, 0), unseen, arguments.out / f"weight-{weight}", seed=0)
        for network in (networks.vqgan, networks.clip):
            network.cpu()  # from the GPU that they were trained with
        results[str(weight)] = {
            "minutes": (time.monotonic() - began) / 60,
            "loss": record["loss"],
            **drawn(networks, trainer.gpt.eval(), unseen),
        }
        print(weight, results[str(weight)], flush=True)
    return results


@torch.inference_mode()
def drawn(networks: Networks, gpt: GPT, unseen: EncodedPictures, count: int = 96) -> dict[str, float]:
    embeddings = torch.stack([unseen[i][3] for i in range(count)])
    tokens = torch.stack([unseen[i][1] for i in range(count)])
    losses = torch.nn.functional.cross_entropy(gpt(embeddings, tokens[:, :-1]).transpose(1, 2), tokens)
    length = gpt.config.block_size
    found = sample_tokens(gpt, embeddings, candidate_uniforms(0, range(count), length), Sampling())
    images = networks.vqgan.decode(found)
    near = (networks.clip.encode_image(images) * embeddings).sum(dim=1).mean()
    right = []
    for i, picture in enumerate(to_pil(images)):
        scene = sample_scene(training_rng(UNSEEN.seed, i))
        right.append(satisfies(read(np.asarray(picture)), describe(scene)))
    return {"unseen_loss": float(losses), "cosine": float(near), "judged_right": float(np.mean(right))}


def main() -> None:
    choices: dict[str, Callable] = {"quantizer": quantizer, "second_loss": second_loss}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=choices)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/shapes"))
    parser.add_argument("--quantizers", nargs="+", default=["taming", "cosine"])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 0.5])
    parser.add_argument("--further", action="store_true", help="go on from the model's transformer, not from none")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = choices[arguments.what](arguments)
    (arguments.out / "result.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
