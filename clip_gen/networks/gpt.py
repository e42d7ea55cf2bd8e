"""The transformer that predicts image tokens from a CLIP embedding: a pre-norm decoder, as GPT-2.

The condition takes position 0, so token t is predicted at position t from the tokens before it: those to its left and
above, or with a row delay those of earlier steps.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import GPTConfig
from clip_gen.networks.float16_linear import Float16Linear
from clip_gen.networks.grid import diagonal_steps, grid_rotation, neighbour_positions, rotate
from clip_gen.networks.kv_cache import EmbeddingBagCache, KVCache
from clip_gen.networks.sketch import FEATURES, Sketch


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x.to(self.qkv.bias.dtype)).view(batch, length, 3, self.n_head, width // self.n_head)
        heads = heads.permute(2, 0, 3, 1, 4)
        q, k, v = heads  # (B, H, n, D) each
        if rotation is not None:
            q, k = rotate(heads[:2], rotation)
        # No dropout of attention weights: torch has no fast kernel for it on a CPU.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))

    def step(self, x: Tensor, rotation: tuple[Tensor, ...] | None, cache: KVCache, layer: int) -> Tensor:
        """Like forward for one new position, x (B, n_embd). Rows after cache.rows are padding and attend to nothing."""
        padding = x.shape[0] - cache.rows
        # .forward: calling a module takes longer, for its hooks. All calls of a step: a tenth of a small model's time.
        heads = self.qkv.forward(x.to(self.qkv.bias.dtype)).view(x.shape[0], 3, self.n_head, -1)[: cache.rows]
        q, k, v = heads.unbind(1)  # (rows, H, D) each
        if rotation is not None:
            q, k = rotate(heads[:, :2], rotation).unbind(1)
        y = cache.attend(layer, q, k, v).flatten(1)
        return self.proj.forward(F.pad(y, (0, 0, 0, padding)) if padding else y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x.to(self.fc.bias.dtype))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), rotation, mask))
        return x + self.dropout(self.mlp(self.ln_2(x)))

    def step(self, x: Tensor, rotation: tuple[Tensor, ...] | None, cache: KVCache, layer: int) -> Tensor:
        """Like forward for one new position, x (B, n_embd), without dropout."""
        x = x + self.attn.step(self.ln_1.forward(x), rotation, cache, layer)
        return x + self.mlp.forward(self.ln_2.forward(x))


def project_condition(
    condition: nn.Linear, null_condition: Tensor | None, embedding: Tensor, unconditional: Tensor | None
) -> Tensor:
    """As GPT.prefix, with these parameters of a transformer."""
    projected = condition(embedding)
    if unconditional is None:
        return projected
    assert null_condition is not None, "a transformer without a null condition is never unconditional"
    return torch.where(unconditional[:, None], null_condition.to(projected.dtype), projected)


class GPT(nn.Module):
    """`forward` gives the logits of all positions at once, `step` one position at a time, with a cache of keys and
    values.

    With neighbour_context a position's input is the condition and the four tokens next to it (`neighbour_positions`),
    instead of the previous token alone. With a sketch, its features around a position are added to its input.

    With row_delay a position depends on all positions of earlier `steps` instead of those before it, and
    sampling/diagonal.py samples it.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        side = math.isqrt(config.block_size)
        self.condition = nn.Linear(config.embed_dim, config.n_embd)
        self.null_condition = nn.Parameter(torch.zeros(config.n_embd)) if config.null_condition else None
        self.token_embedding = nn.Embedding(config.codebook_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.around = nn.Linear(4 * config.n_embd, config.n_embd, bias=False) if config.neighbour_context else None
        self.outside = nn.Parameter(torch.zeros(config.n_embd)) if config.neighbour_context else None
        self.sketch = Sketch(config) if config.sketch_drawings else None
        self.from_sketch = nn.Conv2d(FEATURES, config.n_embd, 3, padding=1) if config.sketch_drawings else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.codebook_size, bias=config.head_bias)
        rotation = grid_rotation(side, config.n_embd // config.n_head) if config.rotary else None
        self.register_buffer("rotation", rotation, persistent=False)
        neighbours = neighbour_positions(side, config.row_delay) if config.neighbour_context else None
        self.register_buffer("neighbour_positions", neighbours, persistent=False)
        steps = diagonal_steps(side, config.row_delay) if config.row_delay else None
        self.register_buffer("steps", steps, persistent=False)  # in which each position is sampled
        self.register_buffer("neighbour_table", None, persistent=False)  # set in cast_for_inference
        self.register_buffer("neighbour_starts", None, persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Block):
            # GPT-2's scaling: the residual stream sums 2 · n_layer branches.
            for proj in (module.attn.proj, module.mlp.proj):
                nn.init.normal_(proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
        elif isinstance(module, Sketch):
            module.init_weights()
        elif module is self:
            # A unit-length embedding has elements of about 1 / sqrt(E), so its projection needs larger weights.
            nn.init.normal_(self.condition.weight, std=0.5)
            if self.null_condition is not None:
                nn.init.normal_(self.null_condition, std=0.5)
            if self.outside is not None:
                nn.init.normal_(self.outside, std=0.02)

    def prefix(self, embedding: Tensor, unconditional: Tensor | None = None) -> Tensor:
        """The projected condition, (B, n_embd).

        embedding: (B, E), unit length. unconditional: (B,) bool; those rows get the learned null condition of
        classifier-free guidance, which replaces a tenth of the conditions in training.
        """
        return project_condition(self.condition, self.null_condition, embedding, unconditional)

    def sketched(self, prefix: Tensor) -> Tensor | None:
        """What the sketch of a condition (B, n_embd) adds to the inputs of all positions, (B, T, n_embd)."""
        if self.sketch is None:
            return None
        side = math.isqrt(self.config.block_size)
        features = self.sketch(prefix).transpose(1, 2).unflatten(2, (side, side))
        return self.from_sketch(features).flatten(2).transpose(1, 2)

    def sketched_one_by_one(self, prefix: Tensor) -> Tensor | None:
        """As sketched, with the same bits for a condition in every batch."""
        if self.sketch is None:
            return None
        different, numbers = prefix.unique(dim=0, return_inverse=True)
        return torch.cat([self.sketched(row[None]) for row in different])[numbers]

    def forward(
        self,
        embedding: Tensor,
        tokens: Tensor,
        unconditional: Tensor | None = None,
        positions: Tensor | None = None,
        probabilities: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, n + 1, V) for positions 0 to n, given the first n tokens (B, n); n < block_size.

        positions: (B, K), a sorted random subset that begins with 0; then only these are computed, (B, K, V).
        probabilities: (B, K), with which each position was included. Attention weighs it by the inverse, so its sums
        are those over all positions on average.
        """
        assert (positions is None) == (probabilities is None), "positions come with their probabilities"
        assert tokens.shape[1] < self.config.block_size, (tokens.shape, self.config.block_size)
        assert self.steps is None or tokens.shape[1] == self.config.block_size - 1, "a row delay needs all tokens"
        prefix = self.prefix(embedding, unconditional)
        sketched = self.sketched(prefix)
        if positions is None:
            all_positions = slice(0, tokens.shape[1] + 1)
            x = self._inputs(prefix, tokens, all_positions) + self.position_embedding.weight[all_positions]
            x = x if sketched is None else x + sketched[:, all_positions]
            rotation = self.rotation_at(all_positions)
            mask = None if self.steps is None else self.steps[:, None] >= self.steps
        else:
            # position_embedding(...), not .weight[...]: its gradients are summed in a fixed order.
            x = self._inputs(prefix, tokens, positions) + self.position_embedding(positions)
            if sketched is not None:
                x = x + sketched.gather(1, positions[..., None].expand(-1, -1, sketched.shape[2]))
            rotation, mask = self.rotation_at(positions), self._inverse_probability_mask(positions, probabilities)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, mask)
        return self.head(self.ln_f(x))

    def _inputs(self, prefix: Tensor, tokens: Tensor, positions: slice | Tensor) -> Tensor:
        """The blocks' inputs at these positions, (B, K, n_embd), without position embeddings."""
        if self.around is not None:
            outside = self.config.codebook_size
            tokens = F.pad(tokens, (0, self.config.block_size + 1 - tokens.shape[1]), value=outside)
            return self.neighbour_inputs(prefix, tokens, self.neighbour_positions[positions])
        previous = tokens if isinstance(positions, slice) else tokens.gather(1, positions[:, 1:] - 1)
        return torch.cat([prefix[:, None], self.token_embedding(previous)], dim=1)

    def neighbour_inputs(self, prefix: Tensor, tokens: Tensor, neighbours: Tensor) -> Tensor:
        """The inputs (B, K, n_embd) of K positions with these neighbours, (K, 4) or (B, K, 4).

        tokens: (B, T + 1), with codebook_size where no token is known, and at T.
        """
        neighbours = neighbours.expand(len(tokens), -1, -1)
        tokens = tokens.gather(1, neighbours.flatten(1)).view(neighbours.shape)
        if self.neighbour_table is not None:
            return prefix[:, None] + F.embedding(tokens + self.neighbour_starts, self.neighbour_table).sum(dim=2)
        inside = tokens < self.config.codebook_size
        embedded = self.token_embedding(tokens.clamp(max=self.config.codebook_size - 1))
        embedded = torch.where(inside[..., None], embedded, self.outside)  # (B, K, 4, n_embd)
        return prefix[:, None] + embedded[:, :, 0] + self.around(embedded.flatten(2))

    def rotation_at(self, positions: slice | Tensor) -> Tensor | None:
        if self.rotation is None:
            return None
        rotation = self.rotation[:, positions].to(self.dtype)  # (2, K, D) or (2, B, K, D)
        return rotation if rotation.dim() == 3 else rotation[:, :, None]

    def _inverse_probability_mask(self, positions: Tensor, probabilities: Tensor) -> Tensor:
        """An attention mask (B, 1, K, K): causal, and -log p for earlier positions included with probability p."""
        itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)  # always included
        mask = torch.where(itself, 0.0, -probabilities.log()[:, None])
        steps = positions if self.steps is None else self.steps[positions]
        later = steps[:, None] > steps[:, :, None]
        return mask.masked_fill(later, -torch.inf)[:, None].to(self.dtype)

    def step(self, last: Tensor | None, cache: KVCache) -> Tensor:
        """Logits (B, V) for the next position, given the last token (B,); None at position 0."""
        assert self.steps is None, "a row delay needs DiagonalSteps"
        if self.around is None:
            return self.step_from_input(cache.prefix if last is None else self.token_embedding(last), cache)
        if last is not None:
            cache.tokens[:, cache.length - 1] = last
        return self.step_from_input(self.neighbour_input(cache.position, cache.prefix, cache.tokens), cache)

    def step_from_input(self, x: Tensor, cache: KVCache) -> Tensor:
        """As `step`, from the next position's input (B, n_embd)."""
        x = x + self.position_embedding.weight[cache.position]
        if cache.sketched is not None:
            x = x + cache.sketched_here()
        rotation = None
        if self.rotation is not None:
            rotation = self.rotation[:, cache.position, None, None].to(self.dtype).unbind()  # (1 or B, 1, 1, D) each
        for layer, block in enumerate(self.blocks):
            x = block.step(x, rotation, cache, layer)
        cache.advance()
        return self.head(self.ln_f(x))

    def neighbour_input(self, position: slice | Tensor, prefix: Tensor, tokens: Tensor) -> Tensor:
        """The input (B, n_embd) of a single position, (1,); tokens as in `neighbour_inputs`."""
        return self.neighbour_inputs(prefix, tokens, self.neighbour_positions[position])[:, 0]

    def new_cache(self, prefix: Tensor, rows: int | None = None) -> KVCache:
        """The cache of a new batch. prefix: (B, n_embd). rows: how many of the rows are no padding; None: all."""
        kind = EmbeddingBagCache if self.cache_dtype == torch.float16 else KVCache
        cache = kind(self.config, rows or len(prefix), device=self.device, dtype=self.cache_dtype)
        cache.prefix, cache.sketched = prefix, self.sketched_one_by_one(prefix)
        shape = len(prefix), self.config.block_size + 1
        cache.tokens = torch.full(shape, self.config.codebook_size, device=prefix.device)
        return cache

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float16 if isinstance(self.head, Float16Linear) else self.dtype

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations inside attention and MLP. The residual stream is float32."""
        return self.blocks[0].attn.qkv.bias.dtype

    def cast_for_inference(self, dtype: torch.dtype) -> GPT:
        """Casts the blocks' matrices, and with them the cache, in place. The network cannot be trained any more.

        float16 (CPU only) also casts the head. Its packed weights cannot be saved, moved or cast again.
        """
        for block in self.blocks:
            block.attn.qkv, block.attn.proj = _cast(block.attn.qkv, dtype), _cast(block.attn.proj, dtype)
            block.mlp.fc, block.mlp.proj = _cast(block.mlp.fc, dtype), _cast(block.mlp.proj, dtype)
        if dtype == torch.float16:
            self.head = _cast(self.head, dtype)
        if self.around is not None:
            self._precompute_neighbours()
        return self

    @torch.no_grad()
    def _precompute_neighbours(self) -> None:
        """Tabulates what each token adds to an input as each of the four neighbours, (4 · (V + 1), n_embd)."""
        embedded = torch.cat([self.token_embedding.weight, self.outside[None]])
        table = torch.stack([F.linear(embedded, part) for part in self.around.weight.chunk(4, dim=1)])
        table[0] += embedded
        self.neighbour_table = table.flatten(0, 1)
        self.neighbour_starts = torch.arange(4, device=self.device) * len(embedded)


def _cast(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    return Float16Linear(linear) if dtype == torch.float16 else linear.to(dtype)


def with_null_condition(gpt: GPT) -> GPT:
    """The same transformer, with shared weights and a null condition, which fine-tuning then learns.

    It starts as the condition of an all-zeros embedding.
    """
    if gpt.null_condition is not None:
        return gpt
    weight = gpt.head.weight
    with torch.device("meta"):
        grown = GPT(replace(gpt.config, null_condition=True))
    weights = {**gpt.state_dict(), "null_condition": gpt.condition.bias.detach().clone()}
    grown.load_state_dict(weights, assign=True)
    grown.rotation, grown.neighbour_positions, grown.steps = gpt.rotation, gpt.neighbour_positions, gpt.steps
    return grown.train(gpt.training).requires_grad_(weight.requires_grad)
