"""HFAiLab's published VQGAN. It is taming's, but its layers are numbered in order of execution.

Its attention is nn.MultiheadAttention with one head instead of convolutions, its group norms have torch's eps, and the
convolutions around the codebook are in the encoder and the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_gen.config import VQGANConfig
from clip_gen.networks.vqgan import VQGAN
from clip_gen.weights.importers.state_dict import Checkpoint, Source, convert_discriminator, on_meta, weight_and_bias

NORM_EPS = 1e-5

# Our names to theirs.
RESNET_NAMES = {
    "norm1": "block.0",
    "conv1": "block.2",
    "norm2": "block.3",
    "conv2": "block.6",
    "nin_shortcut": "shortcut",
}
NAMES = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.norm_out": "encoder.final.0",
    "encoder.conv_out": "encoder.final.2",
    "quant_conv": "encoder.final.3",
    "post_quant_conv": "decoder.quant_conv_in",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.norm_out": "decoder.final.0",
    "decoder.conv_out": "decoder.final.2",
}


@dataclass(frozen=True)
class Level:
    """One resolution of the encoder."""

    channels: int
    resnets: int
    attends: bool


def convert_vqgan(
    checkpoint: Checkpoint, tokens: int, dtype: torch.dtype | None = None
) -> tuple[VQGANConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Sizes and tensors of our VQGAN for pictures of `tokens` tokens, and the tensors of its discriminator."""
    levels = encoder_levels(checkpoint)
    side = math.isqrt(tokens) * 2 ** (len(levels) - 1)
    channels = checkpoint.size("encoder.conv_in.weight")
    config = VQGANConfig(
        resolution=side,
        ch=channels,
        ch_mult=tuple(level.channels // channels for level in levels),
        num_res_blocks=levels[0].resnets,
        attn_resolutions=tuple(side // 2**i for i, level in enumerate(levels) if level.attends),
        z_channels=checkpoint.size("encoder.final.2.weight"),
        norm_eps=NORM_EPS,
        quantizer="taming",
        codebook_size=checkpoint.size("quantizer.embedding.weight"),
        codebook_dim=checkpoint.size("quantizer.embedding.weight", 1),
    )
    network = on_meta(lambda: VQGAN(config), checkpoint.path)
    tensors = checkpoint.without("discriminator.").converted(network, vqgan_sources(config), dtype)
    return config, tensors, convert_discriminator(checkpoint.under("discriminator."), "features.", "head.")


def encoder_levels(checkpoint: Checkpoint) -> list[Level]:
    """The levels in the list encoder.down, where a single convolution halves the resolution and ends a level."""
    levels, channels, resnets, attends = [], 0, 0, False
    down = checkpoint.under("encoder.down.")
    for i in range(checkpoint.count("encoder.down.")):
        kind = next((name.split(".")[1] for name in down.tensors if name.startswith(f"{i}.")), None)
        if kind == "conv":
            levels.append(Level(channels, resnets, attends))
            resnets, attends = 0, False
        elif kind in ("norm", "attn"):
            attends = True
        else:
            channels, resnets = down.size(f"{i}.block.2.weight"), resnets + 1
    return [*levels, Level(channels, resnets, attends)]


def vqgan_sources(config: VQGANConfig) -> dict[str, Source]:
    """Sources of all our tensors, found by going through the layers in order of execution."""
    sources = {"quantizer.quantize.embedding.weight": Source("quantizer.embedding.weight")}
    for ours, theirs in NAMES.items():
        sources |= weight_and_bias(ours, theirs)
    for half in ("encoder", "decoder"):
        sources |= _resnet(f"{half}.mid.block_1", f"{half}.mid.0") | _resnet(f"{half}.mid.block_2", f"{half}.mid.2")
        sources |= _attention(f"{half}.mid.attn_1", f"{half}.mid.1")
    for theirs, layers in (("encoder.down", _down(config)), ("decoder.up", _up(config))):
        for i, ours in enumerate(layers):
            sources |= _layer(ours, f"{theirs}.{i}")
    return sources


def _down(config: VQGANConfig) -> list[str]:
    """Our names of the encoder's layers, in order of execution."""
    layers = []
    for level in range(len(config.ch_mult)):
        layers += _level(f"encoder.down.{level}", config, config.num_res_blocks, level)
        layers.append(f"encoder.down.{level}.downsample")
    return layers[:-1]  # the last level has no downsample


def _up(config: VQGANConfig) -> list[str]:
    """Our names of the decoder's layers, in order of execution."""
    layers = []
    for level in reversed(range(len(config.ch_mult))):
        layers += _level(f"decoder.up.{level}", config, config.num_res_blocks + 1, level)
        layers.append(f"decoder.up.{level}.upsample")
    return layers[:-1]


def _level(name: str, config: VQGANConfig, resnets: int, level: int) -> list[str]:
    attends = config.resolution // 2**level in config.attn_resolutions
    pairs = [[f"{name}.block.{i}", f"{name}.attn.{i}"][: 1 + attends] for i in range(resnets)]
    return [layer for pair in pairs for layer in pair]


def _layer(ours: str, theirs: str) -> dict[str, Source]:
    if ours.endswith("sample"):
        return weight_and_bias(f"{ours}.conv", f"{theirs}.conv")
    return _attention(ours, theirs) if ".attn." in ours else _resnet(ours, theirs)


def _resnet(ours: str, theirs: str) -> dict[str, Source]:
    sources = {}
    for name, their_name in RESNET_NAMES.items():
        sources |= weight_and_bias(f"{ours}.{name}", f"{theirs}.{their_name}")
    return sources


def _attention(ours: str, theirs: str) -> dict[str, Source]:
    """One matrix of queries, keys and values to three 1x1 convolutions."""
    sources = weight_and_bias(f"{ours}.norm", f"{theirs}.norm")
    for part, name in enumerate("qkv"):
        sources[f"{ours}.{name}.weight"] = Source(f"{theirs}.attn.in_proj_weight", part, of=3, trailing_ones=2)
        sources[f"{ours}.{name}.bias"] = Source(f"{theirs}.attn.in_proj_bias", part, of=3)
    sources[f"{ours}.proj_out.weight"] = Source(f"{theirs}.attn.out_proj.weight", trailing_ones=2)
    sources[f"{ours}.proj_out.bias"] = Source(f"{theirs}.attn.out_proj.bias")
    return sources
