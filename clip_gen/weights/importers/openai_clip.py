"""OpenAI's CLIP models (TorchScript archives) and state dicts with the same names, as open_clip has."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clip_gen.config import ClipConfig
from clip_gen.files import sha256_of
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.weights.importers.reader import read_checkpoint
from clip_gen.weights.importers.state_dict import REMEDY, Checkpoint, Source
from clip_gen.weights.model_folder import on_meta

log = logging.getLogger(__name__)

# Of the nine files that OpenAI published.
SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
HEAD_SIZE = 64  # of all OpenAI's CLIPs
MAX_VIT_WIDTH = 1024  # published ones that are wider (ViT-H, ViT-g, ViT-bigG) have other head sizes
SIZES = ("input_resolution", "context_length", "vocab_size")  # tensors in OpenAI's files; shapes tell the same
OURS = "clip."  # prefix of their network in our encoder
TEXT = "text."  # open_clip's prefix of the text tower in some of its classes
TRANSFORMERS = "text_model.embeddings.token_embedding.weight"  # a key of Hugging Face's transformers


def read_clip(path: Path, scripts: Collection[str] = frozenset(SHA256.values())) -> Checkpoint:
    """The tensors of a CLIP file. scripts: SHA-256 of the TorchScript archives that may be loaded."""
    checkpoint = read_checkpoint(path, scripts=scripts)
    if TRANSFORMERS in checkpoint.tensors:
        raise ValueError(
            f"{path}: has the names of Hugging Face's transformers; give the open_clip file of the same model "
            "(open_clip_pytorch_model.bin or open_clip_model.safetensors)"
        )
    return Checkpoint(path, {name.removeprefix(TEXT): tensor for name, tensor in checkpoint.tensors.items()})


def chosen_activation(path: Path, asked: str | None) -> str:
    """The activation function of this CLIP, which cannot be inferred from its weights."""
    if sha256_of(path) in SHA256.values():
        if asked == "gelu":
            raise ValueError(f"--activation is gelu, but {path} is OpenAI's, trained with quick_gelu; leave it out")
        return "quick_gelu"
    if asked is None:
        log.warning(
            f"{path}: is not one of OpenAI's nine files (by its sha256), and weights do not show the activation "
            "function; quick_gelu is assumed, as in OpenAI's models. Most models of open_clip (LAION, DataComp) were "
            "trained with GELU: for those import again with --activation gelu"
        )
    return asked or "quick_gelu"


def convert_clip(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, activation: str = "quick_gelu"
) -> tuple[ClipConfig, dict[str, Tensor]]:
    """Sizes and tensors of our encoder."""
    config = replace(clip_config(checkpoint), activation=activation)
    network = on_meta(lambda: ClipEncoder(config), checkpoint.path, REMEDY)
    sources = {name: Source(name.removeprefix(OURS)) for name in network.state_dict()}
    return config, checkpoint.without(*SIZES).converted(network, sources, dtype)


def clip_config(checkpoint: Checkpoint) -> ClipConfig:
    """The sizes, inferred from the shapes."""
    is_vit = "visual.proj" in checkpoint.tensors
    width = checkpoint.size("visual.conv1.weight" if is_vit else "visual.layer1.0.conv1.weight")
    if is_vit and width > MAX_VIT_WIDTH:
        raise ValueError(
            f"{checkpoint.path}: its image tower has width {width}. Published ViTs wider than {MAX_VIT_WIDTH} (H, g, "
            f"bigG) have attention heads of other sizes than {HEAD_SIZE}, which weights do not show; give a ViT-S, "
            "ViT-B, ViT-L or ResNet"
        )
    patch = checkpoint.size("visual.conv1.weight", -1) if is_vit else None
    positions = checkpoint.size("visual.positional_embedding" if is_vit else "visual.attnpool.positional_embedding")
    layers = ["transformer.resblocks."] if is_vit else [f"layer{i}." for i in (1, 2, 3, 4)]
    text_width = checkpoint.size("ln_final.weight")
    return ClipConfig(
        embed_dim=checkpoint.size("text_projection", 1),
        image_resolution=math.isqrt(positions - 1) * (patch or 32),
        vision_layers=tuple(checkpoint.count(f"visual.{name}") for name in layers),
        vision_width=width,
        vision_patch_size=patch,
        context_length=checkpoint.size("positional_embedding"),
        vocab_size=checkpoint.size("token_embedding.weight"),
        transformer_width=text_width,
        transformer_heads=max(1, text_width // HEAD_SIZE),
        transformer_layers=checkpoint.count("transformer.resblocks."),
    )
