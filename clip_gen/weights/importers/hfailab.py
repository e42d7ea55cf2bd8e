"""HFAiLab's published CLIP-GEN: its transformer and its VQGAN.

The transformer has torch's pre-norm TransformerEncoderLayer, with a causal mask in each block. The VQGAN is taming's
with other names: its layers are numbered in order of execution, and the convolutions around the codebook are in the
encoder and the decoder. Its attention is nn.MultiheadAttention with one head, and its group norms have torch's eps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clip_gen.config import GPTConfig, VQGANConfig
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.weights.importers.state_dict import REMEDY, Checkpoint, Source, convert_discriminator, renamed
from clip_gen.weights.model_folder import on_meta

HEAD_SIZE = 64  # of the published transformers; cannot be inferred from shapes
MIN_HEADS = 4
NORM_EPS = 1e-5

# Parts of our names to parts of theirs.
GPT_NAMES = {
    "token_embedding": "tok_emb",
    "position_embedding.weight": "pos_emb",
    "condition": "cond_proj",
    "ln_f": "norm",
    "ln_1": "encoder.norm1",
    "attn.qkv.": "encoder.self_attn.in_proj_",
    "attn.proj": "encoder.self_attn.out_proj",
    "ln_2": "encoder.norm2",
    "mlp.fc": "encoder.linear1",
    "mlp.proj": "encoder.linear2",
}
VQGAN_NAMES = {
    "quantizer.quantize": "quantizer",
    "encoder.norm_out": "encoder.final.0",
    "encoder.conv_out": "encoder.final.2",
    "post_quant_conv": "decoder.quant_conv_in",
    "quant_conv": "encoder.final.3",
    "decoder.norm_out": "decoder.final.0",
    "decoder.conv_out": "decoder.final.2",
    "mid.block_1": "mid.0",
    "mid.attn_1": "mid.1",
    "mid.block_2": "mid.2",
    "norm1": "block.0",
    "conv1": "block.2",
    "norm2": "block.3",
    "conv2": "block.6",
    "nin_shortcut": "shortcut",
    "proj_out": "attn.out_proj",
}


def convert_gpt(
    checkpoint: Checkpoint, n_head: int | None = None, dtype: torch.dtype | None = None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Sizes and tensors of our transformer. n_head: default width / HEAD_SIZE, at least MIN_HEADS."""
    width = checkpoint.size("tok_emb.weight", 1)
    config = GPTConfig(
        n_layer=checkpoint.count("blocks."),
        n_head=max(MIN_HEADS, width // HEAD_SIZE) if n_head is None else n_head,
        n_embd=width,
        block_size=checkpoint.size("pos_emb", 1),
        codebook_size=checkpoint.size("tok_emb.weight"),
        embed_dim=checkpoint.size("cond_proj.weight", 1),
        head_bias=True,
        null_condition=False,
    )
    if config.n_head < 1 or width % config.n_head:
        raise ValueError(f"--heads is {config.n_head}; give a divisor of the transformer's width, {width}")
    masks = [f"blocks.{i}.mask" for i in range(config.n_layer)]
    length = config.block_size
    for name in masks:
        mask = checkpoint.find(name)
        # True: not attended to.
        if mask.shape != (length, length) or not torch.equal(mask, torch.ones_like(mask, dtype=torch.bool).triu(1)):
            raise ValueError(f"{checkpoint.path}: {name} is not a causal mask of {length} positions; {REMEDY}")
    network = on_meta(lambda: GPT(config), checkpoint.path, REMEDY)
    return config, checkpoint.without(*masks).converted(network, gpt_sources(network), dtype)


def gpt_sources(network: GPT) -> dict[str, Source]:
    """Sources of all our tensors."""
    return {
        name: Source(renamed(name, GPT_NAMES), leading_one=name == "position_embedding.weight")
        for name in network.state_dict()
    }


def convert_vqgan(
    checkpoint: Checkpoint, tokens: int, dtype: torch.dtype | None = None
) -> tuple[VQGANConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Sizes and tensors of our VQGAN for pictures of `tokens` tokens, and the tensors of its discriminator."""
    config = vqgan_config(checkpoint, tokens)
    network = on_meta(lambda: VQGAN(config), checkpoint.path, REMEDY)
    tensors = checkpoint.without("discriminator.").converted(network, vqgan_sources(network), dtype)
    return config, tensors, convert_discriminator(checkpoint.under("discriminator."), "features", "head")


def vqgan_config(checkpoint: Checkpoint, tokens: int) -> VQGANConfig:
    """The sizes. In the list encoder.down a single convolution halves the resolution and ends a level."""
    down = checkpoint.under("encoder.down.")
    resnets, attends = [[]], [False]  # of each level
    for i in range(checkpoint.count("encoder.down.")):
        if down.count(f"{i}.conv."):
            resnets.append([])
            attends.append(False)
        elif down.count(f"{i}.norm.") or down.count(f"{i}.attn."):
            attends[-1] = True
        else:
            resnets[-1].append(i)
    channels = checkpoint.size("encoder.conv_in.weight")
    side = math.isqrt(tokens) * 2 ** (len(resnets) - 1)
    return VQGANConfig(
        resolution=side,
        ch=channels,
        ch_mult=tuple(down.size(f"{max(level, default=0)}.block.2.weight") // channels for level in resnets),
        num_res_blocks=len(resnets[0]),
        attn_resolutions=tuple(side // 2**level for level in range(len(attends)) if attends[level]),
        z_channels=checkpoint.size("encoder.final.2.weight"),
        norm_eps=NORM_EPS,
        quantizer="taming",
        codebook_size=checkpoint.size("quantizer.embedding.weight"),
        codebook_dim=checkpoint.size("quantizer.embedding.weight", 1),
    )


def vqgan_sources(network: VQGAN) -> dict[str, Source]:
    """Sources of all our tensors. One matrix of queries, keys and values is three of our 1x1 convolutions."""
    names = VQGAN_NAMES | _numbered("encoder.down", list(enumerate(network.encoder.down)))
    names |= _numbered("decoder.up", list(enumerate(network.decoder.up))[::-1])
    sources = {}
    for name in network.state_dict():
        theirs = renamed(name, names)
        layer, part, kind = theirs.rsplit(".", 2)
        ones = 2 if kind == "weight" else 0
        if part in ("q", "k", "v"):
            sources[name] = Source(f"{layer}.attn.in_proj_{kind}", "qkv".index(part), of=3, trailing_ones=ones)
        else:
            sources[name] = Source(theirs, trailing_ones=ones if part == "out_proj" else 0)
    return sources


def _numbered(name: str, levels: list[tuple[int, torch.nn.Module]]) -> dict[str, str]:
    """Our names of the layers in a list of levels to theirs, which are numbered in order of execution."""
    layers = []
    for number, level in levels:
        for i in range(len(level.block)):
            layers.append(f"{name}.{number}.block.{i}")
            if len(level.attn):
                layers.append(f"{name}.{number}.attn.{i}")
        layers += [f"{name}.{number}.{last}" for last in ("downsample", "upsample") if hasattr(level, last)]
    return {layer: f"{name}.{i}" for i, layer in enumerate(layers)}
