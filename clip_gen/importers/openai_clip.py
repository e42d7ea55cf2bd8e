"""OpenAI's CLIP models: their official files (TorchScript archives) or plain state dicts."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from clip_gen.clip_encoder import ClipEncoder
from clip_gen.config import ClipConfig
from clip_gen.importers.foreign import UNREADABLE, Foreign, Source, check_there, first_words, planned, read_checkpoint

HEAD_SIZE = 64  # in every CLIP of OpenAI's
OURS = "clip."  # their network is inside our encoder


def read_clip(path: Path) -> Foreign:
    """The tensors of a CLIP file, whatever it is; ValueError when it is none."""
    check_there(path)
    return _read_archive(path) if _is_torchscript(path) else read_checkpoint(path)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_archive(path: Path) -> Foreign:
    try:
        module = torch.jit.load(str(path), map_location="cpu")  # TorchScript: no Python is run, no pickle of Python's
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: cannot be read as a TorchScript archive ({first_words(error)}); get it again"
        ) from error
    return Foreign(path, {name: tensor.detach() for name, tensor in module.state_dict().items()})


def convert_clip(found: Foreign, dtype: torch.dtype | None = None) -> tuple[ClipConfig, dict[str, Tensor]]:
    """Sizes and tensors of our encoder."""
    config = clip_config(found)
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
    patch = found.size("visual.conv1.weight", -1)
    side = math.isqrt(found.size("visual.positional_embedding") - 1)
    return {
        "image_resolution": patch * side,
        "vision_layers": (found.count("visual.transformer.resblocks."),),
        "vision_width": found.size("visual.conv1.weight"),
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
        if stated is not None and (stated.numel() != 1 or stated.item() != size):
            raise ValueError(f"{found.path}: {name} is {stated.tolist()}, but its tensors are for {size}; get it again")
    return Foreign(found.path, {name: tensor for name, tensor in found.tensors.items() if name not in sizes})
