"""`python -m clip_gen train`: every setting as an option, and where to train."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from clip_gen.training.plan import TrainSettings
from clip_gen.training.run import Machine
from clip_gen.training.train import Training

HELP = {
    "stage": "both, vqgan or transformer",
    "tokens": "keep, learn, or auto: the base's stay where they tell these pictures well, else they are learnt anew",
    "precision": "auto, 32-true or bf16-mixed; auto is bfloat16 where the hardware multiplies it",
    "base": "model to start from: a folder, a weights tar or its URL; the bundled one by default",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, help="zip, tar or folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights; started again, it goes on")
    for spec in fields(TrainSettings):
        name = f"--{spec.name.replace('_', '-')}"
        if isinstance(spec.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=spec.default)
        else:
            parser.add_argument(name, type=type(spec.default), default=spec.default, help=HELP.get(spec.name))
    for spec in fields(Machine):
        if spec.name != "max_minutes":
            parser.add_argument(f"--{spec.name.replace('_', '-')}", type=type(spec.default), default=spec.default)


def main(arguments: argparse.Namespace) -> None:
    settings = TrainSettings(**{spec.name: getattr(arguments, spec.name) for spec in fields(TrainSettings)})
    machine = Machine(arguments.devices, arguments.nodes, arguments.strategy, save_seconds=arguments.save_seconds)
    Training(arguments.images, arguments.out, settings, machine).run()
