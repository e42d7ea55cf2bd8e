"""HFAiLab's published transformer: torch's pre-norm TransformerEncoderLayer, with a causal mask in each block."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_gen.config import GPTConfig
from clip_gen.networks.gpt import GPT
from clip_gen.weights.importers.state_dict import REMEDY, Checkpoint, Source, on_meta, weight_and_bias

HEAD_SIZE = 64  # of the published transformers; cannot be inferred from shapes
MIN_HEADS = 4

# Our names to theirs.
NAMES = {"condition": "cond_proj", "ln_f": "norm", "head": "head"}
BLOCK_NAMES = {
    "ln_1": "norm1",
    "attn.proj": "self_attn.out_proj",
    "ln_2": "norm2",
    "mlp.fc": "linear1",
    "mlp.proj": "linear2",
}


def convert_gpt(
    checkpoint: Checkpoint, n_head: int | None = None, dtype: torch.dtype | None = None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Sizes and tensors of our transformer. n_head: default width / HEAD_SIZE, at least MIN_HEADS."""
    width = checkpoint.size("tok_emb.weight", 1)
    config = GPTConfig(
        n_layer=checkpoint.count("blocks."),
        n_head=n_head or max(MIN_HEADS, width // HEAD_SIZE),
        n_embd=width,
        block_size=checkpoint.size("pos_emb", 1),
        codebook_size=checkpoint.size("tok_emb.weight"),
        embed_dim=checkpoint.size("cond_proj.weight", 1),
        head_bias=True,
        null_condition=False,
    )
    if config.n_embd % config.n_head:
        raise ValueError(f"--heads is {config.n_head}, which does not divide the transformer's width, {config.n_embd}")
    masks = {f"blocks.{i}.mask" for i in range(config.n_layer)}
    _check_masks(checkpoint, masks, config.block_size)
    network = on_meta(lambda: GPT(config), checkpoint.path)
    return config, checkpoint.without(*masks).converted(network, gpt_sources(config.n_layer), dtype)


def gpt_sources(n_layer: int) -> dict[str, Source]:
    """Sources of all our tensors."""
    sources = {
        "token_embedding.weight": Source("tok_emb.weight"),
        "position_embedding.weight": Source("pos_emb", leading_one=True),
    }
    for ours, theirs in NAMES.items():
        sources |= weight_and_bias(ours, theirs)
    for i in range(n_layer):
        block, layer = f"blocks.{i}", f"blocks.{i}.encoder"
        for ours, theirs in BLOCK_NAMES.items():
            sources |= weight_and_bias(f"{block}.{ours}", f"{layer}.{theirs}")
        for kind in ("weight", "bias"):
            sources[f"{block}.attn.qkv.{kind}"] = Source(f"{layer}.self_attn.in_proj_{kind}")
    return sources


def _check_masks(checkpoint: Checkpoint, names: set[str], length: int) -> None:
    """ValueError unless their masks are causal, as ours always is."""
    for name in sorted(names):
        mask = checkpoint.find(name)
        # True: not attended to.
        if mask.shape != (length, length) or not torch.equal(mask, torch.ones_like(mask, dtype=torch.bool).triu(1)):
            raise ValueError(f"{checkpoint.path}: {name} is not a causal mask of {length} positions; {REMEDY}")
