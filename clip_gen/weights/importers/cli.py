"""The command `python -m clip_gen import`: published weights to a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from clip_gen.config import ACTIVATIONS
from clip_gen.weights.importers.convert import import_clip, import_hfailab, import_taming

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="format")
    hfailab = formats.add_parser("hfailab", help="HFAiLab's CLIP-GEN: the COCO model")
    hfailab.add_argument("--vqgan", type=Path, required=True, help="vqgan_coco.pt")
    hfailab.add_argument("--gpt", type=Path, required=True, help="gpt_coco.pt")
    hfailab.add_argument("--clip", type=Path, help="clip_vit_b32.pt, or OpenAI's ViT-B-32.pt")
    hfailab.add_argument("--heads", type=int, help="attention heads; default: width / 64, at least 4")
    taming = formats.add_parser("taming", help="a VQGAN of taming-transformers, to train stage 2 on")
    taming.add_argument("--config", type=Path, required=True, help="the YAML file beside the checkpoint")
    taming.add_argument("--checkpoint", type=Path, required=True, help="of the VQGAN, or of a model with it inside")
    clip = formats.add_parser("clip", help="a CLIP of OpenAI or open_clip, into an existing model folder or a new one")
    clip.add_argument("--checkpoint", type=Path, required=True, help="OpenAI's file, or a state dict")
    for command in (hfailab, clip):
        command.add_argument(
            "--activation",
            choices=ACTIVATIONS,
            help="activation function of the CLIP: quick_gelu (OpenAI, the default) or gelu (most models of open_clip)",
        )
    for command in (hfailab, taming, clip):
        command.add_argument("--out", type=Path, required=True, help="the model folder to write")
        command.add_argument("--dtype", choices=DTYPES, help="type of the parameters on disk; default: as published")


def main(arguments: argparse.Namespace) -> None:
    dtype = DTYPES.get(arguments.dtype)
    if arguments.format == "hfailab":
        if arguments.heads is not None and arguments.heads < 1:
            raise ValueError(f"--heads is {arguments.heads}; give 1 or more")
        given = (arguments.clip, arguments.heads, dtype, arguments.activation)
        import_hfailab(arguments.vqgan, arguments.gpt, arguments.out, *given)
    elif arguments.format == "taming":
        import_taming(arguments.config, arguments.checkpoint, arguments.out, dtype)
    else:
        import_clip(arguments.checkpoint, arguments.out, dtype, arguments.activation)
