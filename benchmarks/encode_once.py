"""Stage 2 on pictures encoded once, beside a loop that encodes every picture at every step.

    .venv/bin/python benchmarks/encode_once.py [--size laptop small medium] [--pictures 64] [--json encode_once.json]

The same transformer, batch and optimiser for both, random weights, the bundled CLIP; picture files are read from disk
where a loop would read them. Prints pictures a second and their ratio. The reference draws each batch's pictures,
embeds and tokenises them, and takes the step, as public re-implementations of CLIP-GEN do.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import default_collate

from clip_gen.checkpoint import load_networks
from clip_gen.gpt import GPT
from clip_gen.images import from_bytes, to_pil
from clip_gen.shapes.pairs import RenderedPictures
from clip_gen.training.dataset import EncodedPictures, Endless, PictureFiles, encode_embeddings, encode_tokens
from clip_gen.training.gpt_trainer import token_loss
from clip_gen.training.plan import TrainSettings, plan
from clip_gen.vqgan import VQGAN

ROOT = Path(__file__).resolve().parents[1]


def measure(size: str, pictures: int, batch_size: int, steps: int, folder: Path) -> dict[str, float]:
    """Pictures a second with the pictures encoded once ("once"), and at every step ("every")."""
    base = load_networks(ROOT / "checkpoints" / "shapes")
    config = plan(TrainSettings(size=size), base.config, pictures).model
    torch.manual_seed(0)
    vqgan, gpt = VQGAN(config.vqgan), GPT(config.gpt)
    paths = write_pictures(folder, pictures, config.vqgan.resolution)
    files = PictureFiles(paths, config.vqgan.resolution)
    vqgan(from_bytes(torch.stack([torch.from_numpy(files[i]) for i in range(8)])))  # the codebook starts
    vqgan.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4)

    def step(embeddings: torch.Tensor, tokens: torch.Tensor) -> None:
        optimizer.zero_grad()
        token_loss(gpt(embeddings, tokens[:, :-1]), tokens).backward()
        optimizer.step()

    embeddings = encode_embeddings(files, base.clip, folder / f"{size}-embeddings.npy")
    tokens = encode_tokens(files, vqgan, folder / f"{size}-tokens.npy")
    once, every = Endless(EncodedPictures(embeddings, tokens, noise=0.5, dropout=0.1), 0), Endless(files, 0)

    def encoded_once(number: int) -> None:
        conditions, tokens, _, _ = default_collate([once[number * batch_size + i] for i in range(batch_size)])
        step(conditions, tokens)

    def encoded_every_time(number: int) -> None:
        images = from_bytes(default_collate([every[number * batch_size + i] for i in range(batch_size)]))
        step(base.clip.encode_image(images), vqgan.encode(images))

    return {
        "once": speed(encoded_once, batch_size, steps),
        "every": speed(encoded_every_time, batch_size, steps),
    }


def speed(step: Callable[[int], None], batch_size: int, steps: int) -> float:
    step(0)
    began = time.perf_counter()
    for number in range(steps):
        step(number)
    return batch_size * steps / (time.perf_counter() - began)


def write_pictures(folder: Path, count: int, resolution: int) -> list[Path]:
    """Pictures half as large again as the network's, as photographs are larger too."""
    rendered = RenderedPictures(count, 0, resolution * 3 // 2)
    paths = []
    for i in range(count):
        paths.append(folder / f"{resolution}-{i}.jpg")
        to_pil(from_bytes(torch.from_numpy(rendered[i][None])))[0].save(paths[-1], quality=95)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["laptop", "small", "medium"])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    results = {}
    print(f"{'size':10} {'once':>8} {'every step':>11} {'ratio':>6}   pictures a second, {machine['threads']} threads")
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(size, arguments.pictures, arguments.batch_size, arguments.steps, Path(folder))
        results[size] = found | {"ratio": found["once"] / found["every"]}
        print(f"{size:10} {found['once']:8.1f} {found['every']:11.1f} {results[size]['ratio']:6.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
