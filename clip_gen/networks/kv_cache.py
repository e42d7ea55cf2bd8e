"""Keys and values of the places seen so far, and attention over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.config import GPTConfig

BLOCK = 64  # places, at most, whose keys lie transposed together: fewer, more sums; more, more scores nobody asks for


class KVCache:
    """Keys and values of every layer for the positions seen so far, allocated once for the whole picture.

    rows: of a batch whose later rows are there to fill it up; those attend to nothing, and what comes of them means
    nothing.
    """

    block = 1  # places whose keys lie together

    def __init__(self, config: GPTConfig, rows: int, *, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, rows, config.n_head, config.block_size, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, H, T, D)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows, self.length = rows, 0
        self.prefix: Tensor | None = None  # with `neighbour_context`: (B, n_embd), and the tokens so far,
        self.tokens: Tensor | None = None  # (B, T + 1), as GPT.surrounded wants them
        self.steps: list[Callable] | None = None  # of the layers of the transformer that made this cache
        self.mask: Tensor | None = None  # which of what `extend` returns may be looked at, where not all of it

    @property
    def place(self) -> slice | Tensor:
        """Where the next token goes."""
        return slice(self.length, self.length + 1)

    @property
    def written(self) -> int:
        """How many places, from the first, may hold something."""
        return self.length

    def advance(self) -> None:
        self.length += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Writes key and value behind what is there; returns what the query finds in all so far. Each (rows, H, D).

        `advance` when the step is over.
        """
        keys, values = self.extend(layer, key, value)
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, self.mask)[:, :, 0]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys.select(2, self.length).copy_(key)
        values.select(2, self.length).copy_(value)
        return keys.narrow(2, 0, self.length + 1), values.narrow(2, 0, self.length + 1)

    def take(self, other: KVCache, rows: Tensor) -> None:
        """Becomes what these rows (n,) of another cache are."""
        blocks = -(-other.written // self.block)
        for layer in range(len(self.keys)):
            self.keys[layer, :, :, :blocks] = other.keys[layer, :, :, :blocks][rows]
            self.values[layer, :, :, : other.written] = other.values[layer, :, :, : other.written][rows]
        self.length = other.length


class SummedCache(KVCache):
    """In float16 on a CPU, with attention by sums of rows: over many rows it takes half as long as torch's own, which
    multiplies matrices of a single row there, and is slower still in float16.

    What a query finds is the sum of all values, each by its share. And its scores are the sum of a row for every
    channel, where keys lie transposed, each by what the query has there. Such sums are what embedding_bag is for; it
    adds up in float32, and gives float16, which ends at 65504.
    """

    def __init__(self, config: GPTConfig, rows: int, *, device: torch.device, dtype: torch.dtype):
        blocks = -(-config.block_size // BLOCK)
        self.block = -(-config.block_size // blocks)
        super().__init__(replace(config, block_size=blocks * self.block), rows, device=device, dtype=dtype)
        layers, _, heads, places, size = self.keys.shape
        self.keys = self.keys.view(layers, rows, heads, blocks, size, self.block)
        self.tables = [(k.view(-1, self.block), v.view(-1, size)) for k, v in zip(self.keys, self.values, strict=True)]
        # The tables' rows, for each head of each row of the batch.
        self.channels = torch.arange(rows * heads * blocks * size, dtype=torch.int32).view(-1, blocks, size)
        self.places = torch.arange(rows * heads * places, dtype=torch.int32).view(-1, places)
        self.summed = 0
        self._sum_over(1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.summed != self.length + 1:
            self._sum_over(self.length + 1)
        self.last_keys[layer].copy_(key)
        self.last_values[layer].copy_(value)
        keys, values = self.tables[layer]
        torch.mul(query.unsqueeze(2), self.scale, out=self.weights)
        scores = _sums(keys, self.channel_rows, self.channel_starts, self.flat_weights)
        shares = scores.view(len(self.places), -1).narrow(1, 0, self.summed).softmax(dim=1)
        return _sums(values, self.place_rows, self.place_starts, shares.view(-1)).view(value.shape).to(value.dtype)

    def _sum_over(self, places: int) -> None:
        """Makes ready for sums over so many places, which are of the same rows in every layer."""
        _, rows, heads, _, size, _ = self.keys.shape
        blocks = -(-places // self.block)
        if blocks != -(-self.summed // self.block):
            self.scale = torch.full((blocks, 1), size**-0.5)
            self.weights = torch.empty(rows, heads, blocks, size, dtype=self.keys.dtype)
            self.flat_weights = self.weights.view(-1)
            self.channel_rows = self.channels[:, :blocks].flatten()
            self.channel_starts = torch.arange(0, self.weights.numel(), size, dtype=torch.int32)
        block, place = divmod(places - 1, self.block)
        self.last_keys = self.keys[:, :, :, block, :, place].unbind()  # of every layer, (rows, H, D)
        self.last_values = self.values[:, :, :, places - 1].unbind()
        self.place_rows = self.places[:, :places].flatten()
        self.place_starts = torch.arange(0, len(self.place_rows), places, dtype=torch.int32)
        self.summed = places


def _sums(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """For each start, the sum of the rows of table named from there to the next, each by its weight."""
    return torch.embedding_bag(table, rows, starts, mode=0, per_sample_weights=weights)[0]
