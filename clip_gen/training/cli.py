"""`python -m clip_gen train`: every setting as an option, and where to train."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from clip_gen.cog_signature import read_signature
from clip_gen.files import ROOT
from clip_gen.training.plan import TrainSettings
from clip_gen.training.run import Machine
from clip_gen.training.train import Training

MACHINE = {
    "devices": "How many GPUs, or without any, processes.",
    "nodes": "Machines that train together, each with so many devices.",
    "strategy": "ddp: every device holds all weights. fsdp: a share of the transformer's.",
    "save_seconds": "Between checkpoints.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, help="zip, tar or folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights; started again, it goes on")
    inputs = {one.name: one.arguments for one in read_signature(ROOT / "train.py", "train").inputs}
    specs = {spec.name: spec for spec in (*fields(TrainSettings), *fields(Machine))}
    for name, spec in specs.items():
        told, kind = inputs.get(name, {}), type(spec.default)
        words = told.get("description") or MACHINE[name]
        words += "" if spec.default == "" else " Default: %(default)s."
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:  # choices are TrainSettings.check's, which names the value and the remedy
            how = {"type": kind, "metavar": "|".join(told.get("choices", [kind.__name__]))}
        parser.add_argument(f"--{name.replace('_', '-')}", default=spec.default, help=words, **how)


def main(arguments: argparse.Namespace) -> None:
    settings = TrainSettings(**{spec.name: getattr(arguments, spec.name) for spec in fields(TrainSettings)})
    machine = Machine(arguments.devices, arguments.nodes, arguments.strategy, save_seconds=arguments.save_seconds)
    Training(arguments.images, arguments.out, settings, machine).run()
