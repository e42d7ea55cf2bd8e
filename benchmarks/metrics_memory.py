"""Memory of the metrics of `evaluate --images` on many pictures, which are made as they are asked for.

    python -m benchmarks metrics-memory [--pictures 50000] [--features 2048] [--out metrics-memory.json]

Streams as many real and as many drawn pictures of 64 pixels through a small random feature network, which is as wide as
InceptionV3, and a small random CLIP of 512, and computes every metric of pictures from prompts. The time grows with the
square of the pictures: `--pictures 5000 --features 128` takes half a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.figures import RESULTS, machine, markdown
from clip_gen.config import ClipConfig
from clip_gen.evaluation.measuring import BATCH, Drawn, Measuring
from clip_gen.metrics.features import FeatureNetwork
from clip_gen.networks.clip_encoder import ClipEncoder

SIDE, ROUGH = 64, 8  # pixels of a picture, and of the noise that it is made of
CLASSES = 1008  # of InceptionV3
CPU = torch.device("cpu")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks metrics-memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pictures", type=int, default=50_000, help="in each of the two sets")
    parser.add_argument("--features", type=int, default=2048, help="of a picture")
    parser.add_argument("--out", type=Path, default=RESULTS / "metrics-memory.json", help="a JSON file")
    arguments = parser.parse_args(words)
    row = measure(arguments.pictures, arguments.features)
    arguments.out.write_text(json.dumps({"machine": machine(CPU), "row": row}, indent=1) + "\n")
    print(markdown([row], list(row)))


def measure(pictures: int, features: int) -> dict[str, object]:
    torch.manual_seed(0)
    began, before = time.monotonic(), peak_memory()
    measuring = Measuring(random_network(features), random_clip(min(512, features)), "random", CPU)
    real, drawn = (measuring.features(made_pictures(pictures, seed)) for seed in (0, 1))
    prompts = [f"prompt {number}" for number in range(pictures)]
    texts = F.normalize(torch.randn(pictures, drawn.embeddings.shape[1]), dim=1)
    pictures_drawn = Drawn([Path(prompt) for prompt in prompts], drawn)
    measuring.drawn("drawn", pictures_drawn, real, real, None)
    measuring.prompts("drawn", pictures_drawn, prompts, texts, bias="")
    return {
        "pictures": pictures,
        "features": features,
        "metrics": len(measuring.figures),
        "GB at the start": round(before / 1e9, 2),
        "GB at the peak": round(peak_memory() / 1e9, 2),
        "minutes": round((time.monotonic() - began) / 60, 2),
    }


def peak_memory() -> int:
    """Bytes, of this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def made_pictures(count: int, seed: int) -> Iterator[Tensor]:
    """Blurred noise in batches (B, 3, S, S) in [-1, 1], of which each seed has its own kind."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, count, BATCH):
        rough = torch.rand(min(BATCH, count - first), 3, ROUGH, ROUGH, generator=generator)
        yield F.interpolate(rough ** (1 + 0.1 * seed), (SIDE, SIDE), mode="bilinear") * 2 - 1


def random_network(features: int) -> FeatureNetwork:
    weight, classes = torch.randn(3 * ROUGH**2, features), torch.randn(features, CLASSES) / features

    def extract(images: Tensor) -> Tensor:
        return (F.adaptive_avg_pool2d(images, ROUGH).flatten(1) @ weight).relu()

    return FeatureNetwork(f"random ({features})", extract, lambda rows: rows @ classes)


def random_clip(embed_dim: int) -> ClipEncoder:
    config = ClipConfig(
        embed_dim=embed_dim,
        image_resolution=SIDE,
        vision_layers=(1,),
        vision_width=64,
        vision_patch_size=16,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=1,
    )
    return ClipEncoder(config).eval().requires_grad_(False)
