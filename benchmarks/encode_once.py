"""Stage 2 as it trains here, beside a loop that encodes every picture at every step.

    PYTHONPATH=. .venv/bin/python benchmarks/encode_once.py [--size laptop small medium] [--clip bundled ViT-B/32]
        [--pictures 64] [--json FILE]

The same transformer and batch for all, random weights, the bundled CLIP and one of the size that the public
re-implementation uses; picture files, 256 by 256 like those of own_pictures.py scratch, are read from disk where a loop
would read them. "every step" draws each batch's pictures, embeds and tokenises them and takes the step in plain
float32, as public re-implementations of CLIP-GEN do; "once" is the same loop on pictures encoded once; "trained" is
what `python -m clip_gen train` does: encoded once, from the places that tell something and a few others, in bfloat16
where the machine has it, compiled where it has a compiler. Prints pictures a second, and how many times as many
as "every step".
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from figures import machine
from pytorch_lightning.callbacks import Callback
from torch.utils.data import Subset, default_collate

from clip_gen.config import ModelConfig, read_config
from clip_gen.hardware import choose_device, on_device
from clip_gen.images import from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.datasets import (
    EncodedPictures,
    Endless,
    PictureFiles,
    encode_embeddings,
    encode_tokens,
    enough_places,
)
from clip_gen.training.fit import fit
from clip_gen.training.gpt_trainer import GPTTrainer, token_loss
from clip_gen.training.plan import TrainSettings, plan
from clip_gen.weights.model_folder import load_networks
from clip_gen.worlds.shapes.folder import write_pictures

BUNDLED = Path(__file__).resolve().parents[1] / "checkpoints" / "shapes"


def measure(size: str, clip: ClipEncoder, pictures: int, batch_size: int, steps: int, folder: Path) -> dict[str, float]:
    """Pictures a second of each."""
    base = replace(read_config(BUNDLED / "config.yaml", ModelConfig), clip=clip.config)
    settled = plan(TrainSettings(size=size), base, pictures, torch.cuda.is_available())
    config = settled.model
    torch.manual_seed(0)
    vqgan, gpt = VQGAN(config.vqgan), GPT(config.gpt)
    write_pictures(pictures, 0, folder / "pictures", 256, captions=False, zipped=False, held_out="never")
    files = PictureFiles(sorted((folder / "pictures").glob("*.png")), config.vqgan.resolution)
    vqgan(from_bytes(torch.stack([torch.from_numpy(files[i]) for i in range(8)])))  # the codebook starts
    vqgan.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4)

    def step(embeddings: torch.Tensor, tokens: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = token_loss(gpt(embeddings, tokens[:, :-1]), tokens)
        loss.backward()
        optimizer.step()
        loss.item()  # so that a GPU is done when the time is taken

    embeddings = encode_embeddings(files, clip, folder / f"{size}-embeddings.npy")
    tokens = encode_tokens(files, vqgan, folder / f"{size}-tokens.npy")
    once, every = Endless(EncodedPictures(embeddings, tokens, noise=0.5, dropout=0.1), 0), Endless(files, 0)
    places = enough_places(np.load(tokens))
    learnt = Endless(EncodedPictures(embeddings, tokens, noise=0.5, dropout=0.1, places=places), 0)

    def encoded_once(number: int) -> None:
        conditions, tokens, *_ = default_collate([once[number * batch_size + i] for i in range(batch_size)])
        step(conditions.to(device), tokens.to(device))

    def encoded_every_time(number: int) -> None:
        pixels = default_collate([every[number * batch_size + i] for i in range(batch_size)])
        images = from_bytes(pixels.to(device))
        step(clip.encode_image(images), vqgan.encode(images))

    with on_device(gpt, vqgan, clip) as device:
        found = {
            "every step": speed(encoded_every_time, batch_size, steps),
            "once": speed(encoded_once, batch_size, steps),
        }
    fitting = replace(
        settled.transformer, steps=4 * steps + 4, batch_size=batch_size, compile=shutil.which("g++") is not None
    )
    pace = Pace(steps)
    fit(
        "gpt",
        GPTTrainer(gpt.train(), fitting),
        learnt,
        Subset(learnt.pictures, [0]),
        folder / size,
        seed=0,
        callbacks=[pace],
    )
    return found | {"trained": batch_size / pace.seconds, "places": places or config.vqgan.grid**2}


class Pace(Callback):
    """The seconds a step takes, once the first few have set everything up."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, index: int) -> None:
        if index == 3:
            self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step > 3:
            self.seconds = (time.perf_counter() - self.began) / (trainer.global_step - 3)


def speed(step: Callable[[int], None], batch_size: int, steps: int) -> float:
    step(0)
    began = time.perf_counter()
    for number in range(steps):
        step(number)
    return batch_size * steps / (time.perf_counter() - began)


def clip_of(name: str) -> ClipEncoder:
    """The bundled one, or one of OpenAI's size with random weights."""
    if name == "bundled":
        return load_networks(BUNDLED).clip
    torch.manual_seed(0)
    return ClipEncoder(ModelConfig().clip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["laptop", "small", "medium"])
    parser.add_argument("--clip", nargs="+", default=["bundled", "ViT-B/32"], choices=["bundled", "ViT-B/32"])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    facts, results = machine(choose_device("auto")), {}
    print(f"pictures a second on {facts['device']}, {facts['threads']} threads")
    for size, clip in product(arguments.size, arguments.clip):
        with tempfile.TemporaryDirectory() as folder:
            batch_size, steps = arguments.batch_size, arguments.steps
            found = measure(size, clip_of(clip), arguments.pictures, batch_size, steps, Path(folder))
        slowest = found["every step"]
        results[f"{size}, {clip}"] = found | {"ratio": found["trained"] / slowest}
        words = [
            f"{name} {found[name]:.1f} ({found[name] / slowest:.1f}x)" for name in ("every step", "once", "trained")
        ]
        print(f"{size:10} {clip:9} {'   '.join(words)}, from {found['places']} places", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
