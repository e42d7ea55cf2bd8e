"""Several positions of a single candidate in one step: tokens are guessed, and those guessed right are final.

Speculative Jacobi decoding (arXiv 2410.01699) with given random numbers: every position of a window is drawn at once,
with its own random number, from the tokens before it. Up to the first wrong guess these are what single steps would
draw. The other drawn tokens are the next guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.networks.kv_cache import EmbeddingBagCache, bag_sums
from clip_gen.sampling.batch_sizes import STANDARD_ROWS, bitwise_stable_sizes

# Positions of a window, the first choice first. In longer ones too few guesses are right: a sketch guesses better. A
# large model takes hardly longer for 4 rows than for 1, but longer for 8; in a small one calls take most of the time.
WINDOWS = {"small": (8, 6, 4), "sketched": (16, 12, 8, 6, 4), "large": (4, 5, 6)}
LARGE_WIDTH = 512


def first_guesses(gpt: GPT, prefix: Tensor) -> Tensor | None:
    """The likeliest tokens (B, T) of a prefix (B, n_embd), by the sketch; None without a sketch."""
    return None if gpt.sketch is None else gpt.sketch.head(gpt.sketch(prefix)).argmax(dim=2)


def window_length(gpt: GPT, candidates: int, length: int, passes: int) -> int:
    """How many of `length` positions to compute in one step; 1 where windows are not faster.

    They are for a single candidate: two take as long as in single steps, since the slower one counts. A step's products
    have as many rows as positions, so this takes a number that gives a row the same bits as any other. Attention gives
    the same bits in float16 only (WindowCache), and then all tokens are those of single steps.
    """
    if candidates > 1 or gpt.cache_dtype != torch.float16:
        return 1
    stable = [size for size in bitwise_stable_sizes(gpt) if size <= STANDARD_ROWS]
    kind = "large" if gpt.config.n_embd >= LARGE_WIDTH else "sketched" if gpt.sketch is not None else "small"
    return next((window for window in WINDOWS[kind] if window <= length and window * passes in stable), 1)


class WindowCache(EmbeddingBagCache):
    """A cache whose steps take a window of successive positions: the network's rows are (passes · W).

    A wrong guess leaves wrong keys and values, which a later step replaces before it needs them.
    """

    def __init__(self, gpt: GPT, passes: int, window: int):
        super().__init__(gpt.config, passes, device=gpt.device, dtype=gpt.cache_dtype)
        self.passes, self.window, self.rows, self.blocks = passes, window, passes * window, 0
        self.all_positions = torch.arange(gpt.config.block_size).repeat(passes, 1)

    @property
    def position(self) -> Tensor:
        return self.all_positions[:, self.start : self.start + self.window].flatten()

    def sketched_here(self) -> Tensor:
        return self.sketched[:, self.start : self.start + self.window].flatten(0, 1)

    def advance(self) -> None: ...

    def move_to(self, start: int) -> None:
        """Sets the first position of the next step."""
        self.start = start
        blocks = (start + self.window - 1) // self.block + 1
        if blocks != self.blocks:
            self._use(blocks)
        self.lengths = [start + i + 1 for i in range(self.window)] * self.passes
        self.own_shares = [shares[:, :length] for shares, length in zip(self.shares, self.lengths, strict=True)]
        self.new_keys = list(self._key_places(start, start + self.window))
        self.new_values = self.values[:, :, :, start : start + self.window].transpose(2, 3)  # (L, passes, W, H, D)

    def _key_places(self, start: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        """Which positions of the window go to which part of a block of keys, (L, passes, n, H, D)."""
        first = start
        while start < end:
            block, offset = divmod(start, self.block)
            count = min(end - start, self.block - offset)
            place = self.keys[:, :, :, block, :, offset : offset + count]
            yield slice(start - first, start - first + count), place.permute(0, 1, 4, 2, 3)
            start += count

    def _use(self, blocks: int) -> None:
        """Prepares attention over so many blocks of positions."""
        _, passes, heads, _, size, _ = self.keys.shape
        self.blocks, length = blocks, blocks * self.block
        self.scale = torch.full((blocks, 1), size**-0.5)
        self.query = torch.empty(self.rows, heads, blocks, size, dtype=self.keys.dtype)
        self.shares = torch.zeros(self.rows, heads, length, dtype=self.keys.dtype)  # stays 0 for later positions
        key_rows = self.key_rows[:, :blocks].reshape(passes, 1, -1).expand(-1, self.window, -1)
        value_rows = self.value_rows[:, :length].reshape(passes, 1, -1).expand(-1, self.window, -1)
        self.key_indices, self.value_indices = key_rows.flatten(), value_rows.flatten()
        self.key_offsets = torch.arange(0, len(self.key_indices), size, dtype=torch.int32)
        self.value_offsets = torch.arange(0, len(self.value_indices), length, dtype=torch.int32)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key_of, value_of = (part.view(self.passes, self.window, *part.shape[1:]) for part in (key, value))
        for positions, place in self.new_keys:
            place[layer].copy_(key_of[:, positions])
        self.new_values[layer].copy_(value_of)
        keys, values = self.tables[layer]
        torch.mul(query.unsqueeze(2), self.scale, out=self.query)
        scores = bag_sums(keys, self.key_indices, self.key_offsets, self.query.view(-1)).view(self.shares.shape)
        # One by one, because the rounding of a softmax depends on its length.
        for row, length, shares in zip(scores.unbind(), self.lengths, self.own_shares, strict=True):
            torch.softmax(row[:, :length], dim=1, out=shares)
        output = bag_sums(values, self.value_indices, self.value_offsets, self.shares.view(-1))
        return output.view(value.shape).to(value.dtype)


class WindowSteps:
    """The steps of one candidate in windows: called with tokens (1, T) and where to start; logits (passes · W, V).

    tokens: those that are final, and guesses up to the last position of the window. prefix: (passes, n_embd), and any
    rows that pad it.
    """

    def __init__(self, gpt: GPT, prefix: Tensor, passes: int, window: int):
        self.gpt, self.prefix, self.window = gpt, prefix[:passes, None], window
        self.cache = WindowCache(gpt, passes, window)
        self.cache.sketched = gpt.sketched_one_by_one(prefix[:passes])

    def __call__(self, tokens: Tensor, start: int) -> Tensor:
        gpt, passes, end = self.gpt, len(self.prefix), start + self.window
        self.cache.move_to(start)
        if gpt.around is None:
            x = gpt.token_embedding(tokens[:, max(start - 1, 0) : end - 1]).expand(passes, -1, -1)
            x = x if start else torch.cat([self.prefix, x], dim=1)
        else:
            tokens = F.pad(tokens, (0, 1), value=gpt.config.codebook_size).expand(passes, -1)  # outside the picture
            x = gpt.neighbour_inputs(self.prefix[:, 0], tokens, gpt.neighbour_positions[start:end])
        return gpt.step_from_input(x.flatten(0, 1), self.cache)


class Window:
    """The window of a candidate whose tokens (1, T) are final up to a position, and guesses after it."""

    def __init__(self, tokens: Tensor, window: int, kept: Tensor | None, guesses: Tensor | None):
        """kept: (1, T), tokens that are known, -1 elsewhere; None: all are drawn. guesses: (1, T), the first ones."""
        self.tokens, self.window, self.side, self.guesses = tokens, window, math.isqrt(tokens.shape[1]), guesses
        self.kept = torch.full_like(tokens, -1) if kept is None else kept
        self.final = self.guessed = 0  # how many tokens are final, and how many are final or guesses
        tokens.zero_()

    def move(self) -> slice:
        """The next positions. Without `guesses` a first guess is the known token, or the one above, or the last one."""
        start = min(self.final, self.tokens.shape[1] - self.window)
        end = start + self.window
        new = slice(self.guessed, end)
        if self.guesses is not None:
            self.tokens[:, new] = self.guesses[:, new]
        else:
            for position in range(self.guessed, end):
                above = position - self.side if position >= self.side else max(self.final - 1, 0)
                self.tokens[:, position] = self.tokens[:, above]
        self.tokens[:, new] = torch.where(self.kept[:, new] < 0, self.tokens[:, new], self.kept[:, new])
        self.guessed = max(self.guessed, end)
        return slice(start, end)

    def accept(self, positions: slice, drawn: Tensor) -> None:
        """Writes the tokens drawn at these positions, (1, W)."""
        ahead = slice(self.final, positions.stop)
        drawn = drawn[:, self.final - positions.start :]
        wrong = (drawn != self.tokens[:, ahead])[0].tolist()
        # The first token that was guessed wrong is drawn right.
        self.final += wrong.index(True) + 1 if True in wrong else len(wrong)
        self.tokens[:, ahead] = drawn
