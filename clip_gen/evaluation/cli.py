"""The command `evaluate`: on any pictures, or with the judges of a world."""

from __future__ import annotations

import argparse
from pathlib import Path

from clip_gen.evaluation import pictures
from clip_gen.worlds import grading

PROMPTS = 500  # of each kind, with judges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    grading.add_arguments(parser)
    words = f"with --images: a file of prompts, as in generate; else: prompts of each kind, default {PROMPTS}"
    parser.add_argument("--prompts", help=words)  # replaces the world's
    group = parser.add_argument_group("on pictures", "With --images a model of anything is measured on any pictures.")
    group.add_argument("--images", type=Path, help="zip, tar or folder of real pictures")
    group.add_argument("--training", type=Path, help="the model's training pictures, if they are others than --images")
    group.add_argument("--candidates", type=int, default=1, help="draw so many, and keep CLIP's best; default 1")
    words = "pictures to reconstruct and to draw again from their embeddings; default 1000, 0: none"
    group.add_argument("--count", type=int, default=1000, help=words)
    words = "auto: InceptionV3 if `pull inception` was run, else the CLIP"
    group.add_argument("--features", choices=["auto", "inception", "clip"], default="auto", help=words)
    words = "model folder whose CLIP gives CMMD and CLIP scores, as by `pull clip ViT-L/14`; default: the model's own"
    group.add_argument("--clip", type=Path, help=words)
    words = (
        "also FID of pictures from prompts that are blurred with these radii, as in the papers of DALL-E and CogView"
    )
    group.add_argument("--blur", type=int, nargs="+", choices=(1, 2, 4, 8), default=[], help=words)
    group.add_argument("--compare", type=Path, help="report.json of another model, to be shown beside this one")
    group.add_argument("--baseline", type=Path, help="results of `optimise`, to be plotted in the report")


def main(arguments: argparse.Namespace) -> None:
    if arguments.images:
        pictures.run(arguments)
        return
    try:
        arguments.prompts = PROMPTS if arguments.prompts is None else int(arguments.prompts)
    except ValueError as error:
        message = f"prompts is {arguments.prompts!r}; give a number, or --images with a file of prompts"
        raise ValueError(message) from error
    grading.main(arguments)
