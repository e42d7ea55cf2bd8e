"""OpenAI's CLIP models (TorchScript archives) and state dicts in their naming, which open_clip shares."""

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
from clip_gen.weights.importers.reader import AGAIN, read_checkpoint
from clip_gen.weights.importers.state_dict import REMEDY, Foreign, Source, planned

log = logging.getLogger(__name__)

# The nine files that OpenAI published, by the name of the model.
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
HEAD_SIZE = 64  # in every CLIP of OpenAI's
WIDEST_VIT = 1024  # wider ones that are published (ViT-H, ViT-g, ViT-bigG) have other heads
OURS = "clip."  # their network is inside our encoder
TEXT = "text."  # open_clip's prefix of the text tower in some of its classes
TRANSFORMERS = "text_model.embeddings.token_embedding.weight"  # a key of Hugging Face's own naming


def read_clip(path: Path, scripts: Collection[str] = frozenset(SHA256.values())) -> Foreign:
    """The tensors of a CLIP file. scripts: the sha256 of every TorchScript archive that may be loaded."""
    found = read_checkpoint(path, scripts=scripts)
    if TRANSFORMERS in found.tensors:
        raise ValueError(
            f"{path}: has the names of Hugging Face's transformers; give the open_clip file of the same model "
            "(open_clip_pytorch_model.bin or open_clip_model.safetensors)"
        )
    if f"{TEXT}token_embedding.weight" in found.tensors:
        return Foreign(path, {name.removeprefix(TEXT): tensor for name, tensor in found.tensors.items()})
    return found


def chosen_activation(path: Path, asked: str | None) -> str:
    """The activation function to build this CLIP with: weights do not tell it."""
    if sha256_of(path) in SHA256.values():
        if asked == "gelu":
            raise ValueError(f"--activation is gelu, but {path} is OpenAI's, trained with quick_gelu; leave it out")
        return "quick_gelu"
    if asked is None:
        log.warning(
            f"{path}: is not one of OpenAI's nine files (by its sha256), and weights do not tell the activation they "
            "were trained with; quick_gelu is assumed, as in OpenAI's models. Most models of open_clip (LAION, "
            "DataComp) were trained with GELU: for those import again with --activation gelu"
        )
    return asked or "quick_gelu"


def convert_clip(
    found: Foreign, dtype: torch.dtype | None = None, activation: str = "quick_gelu"
) -> tuple[ClipConfig, dict[str, Tensor]]:
    """Sizes and tensors of our encoder."""
    config = replace(clip_config(found), activation=activation)
    rest = _checked_sizes(found, config)
    network = planned(lambda: ClipEncoder(config), found.path)
    sources = {name: Source(name.removeprefix(OURS)) for name in network.state_dict()}
    return config, rest.converted(network, sources, dtype)


def clip_config(found: Foreign) -> ClipConfig:
    """The sizes, as the shapes tell them."""
    width = found.size("ln_final.weight")
    vision = _vit(found) if "visual.proj" in found.tensors else _resnet(found)
    return ClipConfig(
        embed_dim=found.size("text_projection", 1),
        context_length=found.size("positional_embedding"),
        vocab_size=found.size("token_embedding.weight"),
        transformer_width=width,
        transformer_heads=max(1, width // HEAD_SIZE),
        transformer_layers=found.count("transformer.resblocks."),
        **vision,
    )


def _vit(found: Foreign) -> dict[str, object]:
    patch, width = found.size("visual.conv1.weight", -1), found.size("visual.conv1.weight")
    if width > WIDEST_VIT:
        raise ValueError(
            f"{found.path}: its image tower has width {width}. Published ViTs wider than {WIDEST_VIT} (H, g, bigG) "
            f"have attention heads of other sizes than {HEAD_SIZE}, and weights do not tell the size; give a ViT-S, "
            "ViT-B, ViT-L or ResNet"
        )
    side = math.isqrt(found.size("visual.positional_embedding") - 1)
    return {
        "image_resolution": patch * side,
        "vision_layers": (found.count("visual.transformer.resblocks."),),
        "vision_width": width,
        "vision_patch_size": patch,
    }


def _resnet(found: Foreign) -> dict[str, object]:
    side = math.isqrt(found.size("visual.attnpool.positional_embedding") - 1)
    return {
        "image_resolution": 32 * side,
        "vision_layers": tuple(found.count(f"visual.layer{i}.") for i in (1, 2, 3, 4)),
        "vision_width": found.size("visual.layer1.0.conv1.weight"),
        "vision_patch_size": None,
    }


def _checked_sizes(found: Foreign, config: ClipConfig) -> Foreign:
    """Without the three sizes that official files hold as tensors, which must be those of the shapes."""
    sizes = {
        "input_resolution": config.image_resolution,
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        stated = found.tensors.get(name)
        if stated is not None and stated.numel() != 1:
            raise ValueError(f"{found.path}: {name} has shape {tuple(stated.shape)}; {REMEDY}")
        if stated is not None and stated.item() != size:
            raise ValueError(
                f"{found.path}: {name} is {stated.item()}, but its tensors are for {size}; it is damaged: {AGAIN}"
            )
    return Foreign(found.path, {name: tensor for name, tensor in found.tensors.items() if name not in sizes})
