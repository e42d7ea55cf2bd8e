"""The command `python -m clip_gen generate`: a prompt to numbered picture files, best first."""

from __future__ import annotations

import argparse
from pathlib import Path

from clip_gen.images import OUTPUT_FORMATS, save_image
from clip_gen.pipeline import ClipGen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt")
    parser.add_argument("--model", type=Path, default=Path("checkpoints/shapes"), help="the model folder")
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder the pictures go to")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--num-outputs", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--output-format", choices=OUTPUT_FORMATS, default="png")
    parser.add_argument("--device", default="auto")


def main(arguments: argparse.Namespace) -> None:
    model = ClipGen.load(arguments.model, arguments.device)
    names = ("candidates", "num_outputs", "top_k", "top_p", "temperature", "guidance", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    result = model.generate(arguments.prompt, **settings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for i, (image, score) in enumerate(zip(result.images, result.scores, strict=True)):
        path = arguments.out / f"{i}.{arguments.output_format}"
        metadata = {"prompt": arguments.prompt, **settings, "seed": result.seed, "score": round(score, 4)}
        save_image(image, path, arguments.output_format, metadata=metadata)
        print(f"{path}  score {score:.4f}")
    print(f"seed {result.seed}")
