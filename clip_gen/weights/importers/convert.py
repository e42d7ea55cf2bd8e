"""The command `python -m clip_gen import`: converts published weights to a model folder, written atomically."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clip_gen.config import ACTIVATIONS, BridgeConfig, ClipConfig, ModelConfig
from clip_gen.files import atomic_folder
from clip_gen.networks.bridge import Bridge
from clip_gen.weights.importers import hfailab, openai_clip, taming
from clip_gen.weights.importers.reader import origin, read_checkpoint
from clip_gen.weights.model_folder import (
    CONFIG,
    LICENSES,
    check_model_folder,
    load_config,
    load_record,
    write_description,
    write_part,
)

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="format")
    coco = formats.add_parser("hfailab", help="HFAiLab's CLIP-GEN: the COCO model")
    coco.add_argument("--vqgan", type=Path, required=True, help="vqgan_coco.pt")
    coco.add_argument("--gpt", type=Path, required=True, help="gpt_coco.pt")
    coco.add_argument("--clip", type=Path, help="clip_vit_b32.pt, or OpenAI's ViT-B-32.pt")
    coco.add_argument("--heads", type=int, help="attention heads; default: width / 64, at least 4")
    vqgan = formats.add_parser("taming", help="a VQGAN of taming-transformers, to train stage 2 on")
    vqgan.add_argument("--config", type=Path, required=True, help="the YAML file beside the checkpoint")
    vqgan.add_argument("--checkpoint", type=Path, required=True, help="of the VQGAN, or of a model with it inside")
    clip = formats.add_parser("clip", help="a CLIP of OpenAI or open_clip, into an existing model folder or a new one")
    clip.add_argument("--checkpoint", type=Path, required=True, help="OpenAI's file, or a state dict")
    for command in (coco, clip):
        command.add_argument(
            "--activation",
            choices=ACTIVATIONS,
            help="activation function of the CLIP: quick_gelu (OpenAI, the default) or gelu (most models of open_clip)",
        )
    for command in (coco, vqgan, clip):
        command.add_argument("--out", type=Path, required=True, help="the model folder to write")
        command.add_argument("--dtype", choices=DTYPES, help="type of the parameters on disk; default: as published")


def main(arguments: argparse.Namespace) -> None:
    out, dtype = arguments.out, DTYPES.get(arguments.dtype)
    if arguments.format == "hfailab":
        given = (arguments.clip, arguments.heads, dtype, arguments.activation)
        import_hfailab(arguments.vqgan, arguments.gpt, out, *given)
    elif arguments.format == "taming":
        import_taming(arguments.config, arguments.checkpoint, out, dtype)
    else:
        import_clip(arguments.checkpoint, out, dtype, arguments.activation)


def import_hfailab(
    vqgan: Path,
    gpt: Path,
    out: Path,
    clip: Path | None = None,
    n_head: int | None = None,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
) -> None:
    """HFAiLab's files to a model folder. Without `clip` the folder is complete but for its CLIP."""
    check_model_folder(out)
    parts, files = {}, {"vqgan": vqgan, "gpt": gpt}
    gpt_config, parts["gpt"] = hfailab.convert_gpt(read_checkpoint(gpt), n_head, dtype)
    vqgan_config, parts["vqgan"], parts["discriminator"] = hfailab.convert_vqgan(
        read_checkpoint(vqgan), gpt_config.block_size, dtype
    )
    parts["bridge"] = Bridge(gpt_config.embed_dim, BridgeConfig()).state_dict()
    clip_config = ClipConfig(embed_dim=gpt_config.embed_dim)
    if clip is not None:
        clip_config, parts["clip"] = _read_clip(clip, dtype, activation)
        files["clip"] = clip
    log.info(
        f"{gpt.name}: {gpt_config.n_layer} layers of width {gpt_config.n_embd}, {gpt_config.n_head} heads; "
        f"{vqgan.name}: {vqgan_config.resolution} pixels, {vqgan_config.codebook_size} codes"
    )
    config = ModelConfig(name=out.resolve().name, clip=clip_config, vqgan=vqgan_config, gpt=gpt_config)
    _write(out, config, parts, {"imported": _origins(files, "hfailab")})
    if clip is None:
        log.info(f"{out} has no CLIP yet: python -m clip_gen import clip --checkpoint FILE --out {out}")


def import_taming(settings: Path, checkpoint: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """A VQGAN of taming's to a model folder without transformer and CLIP, to train a transformer on."""
    check_model_folder(out)
    config = taming.read_taming_config(settings, out.resolve().name)
    content = read_checkpoint(checkpoint, inside=taming.FIRST_STAGE)
    vqgan, discriminator = taming.convert_vqgan(content, config.vqgan, settings, dtype)
    parts = {"vqgan": vqgan, "discriminator": discriminator}
    _write(out, config, parts, {"imported": _origins({"vqgan": checkpoint}, "taming")})


def import_clip(checkpoint: Path, out: Path, dtype: torch.dtype | None = None, activation: str | None = None) -> None:
    """Adds a CLIP to a model folder, or to a new one.

    activation: "quick_gelu" or "gelu". None: OpenAI's quick_gelu, with a warning if the file is not OpenAI's.
    """
    check_model_folder(out)
    config = load_config(out) if (out / CONFIG).exists() else ModelConfig(name=out.resolve().name)
    record = load_record(out)
    clip_config, tensors = _read_clip(checkpoint, dtype, activation)
    old, new = config.gpt.embed_dim, clip_config.embed_dim
    if old != new and (out / "gpt.safetensors").exists():
        raise ValueError(
            f"{checkpoint}: its embeddings have {new} numbers, but the transformer in {out} was trained on {old}; "
            "give the CLIP it was trained with"
        )
    config = replace(config, clip=clip_config, gpt=replace(config.gpt, embed_dim=new))
    before = record.get("imported")
    record["imported"] = (before if isinstance(before, dict) else {}) | _origins({"clip": checkpoint}, "openai")
    # The bridge has the mean embeddings of the previous CLIP.
    kept = [path for path in out.glob("*.safetensors") if old == new or path.name != "bridge.safetensors"]
    kept += out.glob(LICENSES)
    _write(out, config, {"clip": tensors}, record, kept)


def _read_clip(path: Path, dtype: torch.dtype | None, activation: str | None) -> tuple[ClipConfig, dict[str, Tensor]]:
    return openai_clip.convert_clip(openai_clip.read_clip(path), dtype, openai_clip.chosen_activation(path, activation))


def _write(
    out: Path,
    config: ModelConfig,
    parts: dict[str, dict[str, Tensor]],
    record: dict[str, object],
    kept: Collection[Path] = (),
) -> None:
    """Writes a model folder with these parts, and with the kept files that no part replaces."""
    config.check()
    with atomic_folder(out) as folder:
        for path in kept:
            shutil.copyfile(path, folder / path.name)
        for name, tensors in parts.items():
            if tensors:
                write_part(tensors, folder / f"{name}.safetensors")
        write_description(folder, config, record)
    log.info(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _origins(files: dict[str, Path], form: str) -> dict[str, object]:
    return {part: {"format": form, **origin(path)} for part, path in files.items()}
