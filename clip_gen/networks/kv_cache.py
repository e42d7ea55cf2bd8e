"""Keys and values of earlier positions, and attention over them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.config import GPTConfig

MAX_BLOCK = 64  # positions whose keys EmbeddingBagCache stores together


class KVCache:
    """Keys and values of every layer, allocated for all T positions at the start.

    rows: of the batch. Rows that only pad the batch are not among them: they are not written and attend to nothing.
    """

    def __init__(self, config: GPTConfig, rows: int, *, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, rows, config.n_head, config.block_size, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, H, T, D)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows, self.length = rows, 0
        self.prefix: Tensor | None = None  # (B, n_embd), the projected condition
        self.sketched: Tensor | None = None  # (B, T, n_embd), what the sketch adds to the inputs
        self.tokens: Tensor | None = None  # (B, T + 1); codebook_size where no token is known
        self.mask: Tensor | None = None  # of the positions that `extend` returns; None: attend to all

    @property
    def position(self) -> slice | Tensor:
        """The next position, as an index of length 1."""
        return slice(self.length, self.length + 1)

    def sketched_here(self) -> Tensor:
        """What the sketch adds to the inputs of a step, (B, n_embd)."""
        return self.sketched[:, self.position][:, 0]

    def advance(self) -> None:
        self.length += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends key and value; returns the attention output of the query. All are (rows, H, D).

        Call `advance` after the last layer.
        """
        keys, values = self.extend(layer, key, value)
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, self.mask)[:, :, 0]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys.select(2, self.length).copy_(key)
        values.select(2, self.length).copy_(value)
        return keys.narrow(2, 0, self.length + 1), values.narrow(2, 0, self.length + 1)


class EmbeddingBagCache(KVCache):
    """float16 on a CPU, with attention by torch.embedding_bag: twice as fast as scaled_dot_product_attention there.

    The attention output is a sum of values, weighted by the softmax. The scores of a block of positions are a sum, over
    channels, of the channel's keys at these positions, weighted by the query's channel. So keys are stored transposed:
    (L, B, H, blocks, D, block). embedding_bag computes such weighted sums of rows. It sums in float32 and returns
    float16, so scores are at most 65504.
    """

    def __init__(self, config: GPTConfig, rows: int, *, device: torch.device, dtype: torch.dtype):
        blocks = -(-config.block_size // MAX_BLOCK)
        self.block = -(-config.block_size // blocks)
        super().__init__(replace(config, block_size=blocks * self.block), rows, device=device, dtype=dtype)
        layers, _, heads, length, size = self.keys.shape
        self.keys = self.keys.view(layers, rows, heads, blocks, size, self.block)
        self.tables = [(k.view(-1, self.block), v.view(-1, size)) for k, v in zip(self.keys, self.values, strict=True)]
        # Row numbers in these tables, for every head of every row of the batch.
        self.key_rows = torch.arange(rows * heads * blocks * size, dtype=torch.int32).view(-1, blocks, size)
        self.value_rows = torch.arange(rows * heads * length, dtype=torch.int32).view(-1, length)
        self.prepared_length = 0
        self._prepare(1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.prepared_length != self.length + 1:
            self._prepare(self.length + 1)
        self.new_keys[layer].copy_(key)
        self.new_values[layer].copy_(value)
        keys, values = self.tables[layer]
        torch.mul(query.unsqueeze(2), self.scale, out=self.query)
        scores = bag_sums(keys, self.key_indices, self.key_offsets, self.flat_query)
        shares = scores.view(len(self.value_rows), -1).narrow(1, 0, self.prepared_length).softmax(dim=1)
        output = bag_sums(values, self.value_indices, self.value_offsets, shares.view(-1))
        return output.view(value.shape).to(value.dtype)

    def _prepare(self, length: int) -> None:
        """Computes what attention over `length` positions has in common in all layers."""
        _, rows, heads, _, size, _ = self.keys.shape
        blocks = -(-length // self.block)
        if blocks != -(-self.prepared_length // self.block):
            self.scale = torch.full((blocks, 1), size**-0.5)
            self.query = torch.empty(rows, heads, blocks, size, dtype=self.keys.dtype)
            self.flat_query = self.query.view(-1)
            self.key_indices = self.key_rows[:, :blocks].flatten()
            self.key_offsets = torch.arange(0, self.query.numel(), size, dtype=torch.int32)
        block, offset = divmod(length - 1, self.block)
        self.new_keys = self.keys[:, :, :, block, :, offset].unbind()  # of every layer, (rows, H, D)
        self.new_values = self.values[:, :, :, length - 1].unbind()
        self.value_indices = self.value_rows[:, :length].flatten()
        self.value_offsets = torch.arange(0, len(self.value_indices), length, dtype=torch.int32)
        self.prepared_length = length


def bag_sums(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sums of rows of a table, each multiplied with its weight: one for each bag, which begins at an offset."""
    return torch.embedding_bag(table, indices, offsets, mode=0, per_sample_weights=weights)[0]
