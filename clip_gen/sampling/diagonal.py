"""Sampling of a transformer with a row delay: all rows of a picture at once, each some positions behind the last.

The tokens of a step do not depend on each other. Neighbouring autoregressive modelling, arXiv 2503.10696, and ZipAR,
arXiv 2412.04062, sample in such orders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT, CausalSelfAttention
from clip_gen.networks.grid import rotate
from clip_gen.sampling.batch_sizes import bitwise_stable_sizes, pad_rows


class DiagonalSteps:
    """The steps of a batch: called with its tokens (B, T); returns logits (R · W, V) for the next `positions` (W,).

    prefix: (R, n_embd), of R = passes · B rows. order: all positions as they are sampled, (T,).
    """

    def __init__(self, gpt: GPT, prefix: Tensor, passes: int):
        self.gpt, self.prefix, self.passes = gpt, prefix, passes
        self.sketched = gpt.sketched_one_by_one(prefix)
        self.sizes = None if gpt.device.type == "cuda" else bitwise_stable_sizes(gpt)
        config = gpt.config
        shape = config.n_layer, len(prefix), config.n_head, config.block_size, config.n_embd // config.n_head
        self.keys, self.values = (torch.zeros(shape, device=gpt.device, dtype=gpt.dtype) for _ in range(2))
        self.order = gpt.steps.argsort(stable=True)
        self.parts = [width for width in gpt.steps.bincount().tolist() if width][::-1]  # positions of the steps to come
        self.length = 0  # positions with keys and values, in this order

    @property
    def positions(self) -> Tensor:
        return self.order[self.length :][: self.parts[-1]]

    def __call__(self, tokens: Tensor) -> Tensor:
        gpt, positions = self.gpt, self.positions
        tokens = F.pad(tokens, (0, 1), value=gpt.config.codebook_size).repeat(self.passes, 1)
        x = gpt.neighbour_inputs(self.prefix, tokens, gpt.neighbour_positions[positions])
        x = x + gpt.position_embedding.weight[positions]
        if self.sketched is not None:
            x = x + self.sketched[:, positions]
        rotation = gpt.rotation_at(positions)
        for layer, block in enumerate(gpt.blocks):
            x = x + self._attend(layer, block.attn, block.ln_1(x), rotation)
            x = x + self._product(block.mlp.proj, F.gelu(self._product(block.mlp.fc, block.ln_2(x).to(gpt.dtype))))
        self.length += self.parts.pop()
        return self._product(gpt.head, gpt.ln_f(x)).flatten(0, 1)

    def _attend(self, layer: int, attention: CausalSelfAttention, x: Tensor, rotation: Tensor | None) -> Tensor:
        rows, width, channels = x.shape
        heads = self._product(attention.qkv, x.to(self.gpt.dtype)).view(rows, width, 3, attention.n_head, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (R, H, W, D) each
        if rotation is not None:
            query, key = (rotate(part, rotation) for part in (query, key))
        new, known = (slice(start, self.length + width) for start in (self.length, 0))
        self.keys[layer, :, :, new], self.values[layer, :, :, new] = key, value
        y = F.scaled_dot_product_attention(query, self.keys[layer, :, :, known], self.values[layer, :, :, known])
        return self._product(attention.proj, y.transpose(1, 2).reshape(rows, width, channels))

    def _product(self, linear: nn.Module, x: Tensor) -> Tensor:
        """linear(x) for x (R, W, C), in parts of which each row has the same bits whatever R is."""
        if self.sizes is None:
            return linear(x)
        parts = []
        for part in x.flatten(0, 1).split(self.sizes[-1]):
            size = next(size for size in self.sizes if size >= len(part))
            parts.append(linear(pad_rows(part, size))[: len(part)])
        return torch.cat(parts).unflatten(0, x.shape[:2])
