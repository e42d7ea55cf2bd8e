"""The command `python -m clip_gen generate`: a prompt to numbered picture files, best first."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from clip_gen.images import OUTPUT_FORMATS, save_image
from clip_gen.own_model import own_weights
from clip_gen.pipeline import ClipGen

DEFAULTS = {"candidates": 16, "num_outputs": 4, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "guidance": 1.0}
# What HFAiLab's demo of the published COCO model draws with.
PRESETS = {"coco": {"candidates": 64, "num_outputs": 8, "top_k": 500, "top_p": 0.95}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt")
    parser.add_argument(
        "--model", help="a model folder, a training's folder, a weights tar or its URL; default: as script/predict"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder the pictures go to; default this one")
    parser.add_argument("--preset", choices=PRESETS, help="settings known to suit a model; others given here go before")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}")
    parser.add_argument("--no-clip-rerank", dest="clip_rerank", action="store_false", help="return the first drawn")
    parser.add_argument("--seed", type=int, help="the same seed draws the same pictures; default a random one")
    parser.add_argument("--output-format", choices=OUTPUT_FORMATS, default="png", help="default png")
    parser.add_argument("--output-quality", type=int, default=90, help="of webp and jpg, 0 to 100; default 90")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto for cuda where there is one")


def main(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.output_quality <= 100:
        raise ValueError(f"output_quality is {arguments.output_quality}; give 0 to 100")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"{arguments.out} is a file; name a folder for the pictures")
    weights = arguments.model or own_weights(os.environ.get("COG_WEIGHTS"))[0]
    model = ClipGen.load(weights, arguments.device)
    given = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    settings = {**DEFAULTS, **PRESETS.get(arguments.preset, {}), **given, "seed": arguments.seed}
    settings["clip_rerank"] = arguments.clip_rerank
    result = model.generate(arguments.prompt, **settings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for i, (image, score) in enumerate(zip(result.images, result.scores, strict=True)):
        path = arguments.out / f"{i}.{arguments.output_format}"
        metadata = {"prompt": arguments.prompt, **settings, "candidates": result.candidates, "seed": result.seed}
        metadata["score"] = round(score, 4)
        save_image(image, path, arguments.output_format, arguments.output_quality, metadata)
        print(f"{path}  score {score:.4f}")
    print(f"seed {result.seed}, model {model.config.name}")
