"""The transformer that writes tokens from a CLIP embedding.

A pre-norm decoder after GPT-2. The condition takes position 0, so token t is predicted from tokens < t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import GPTConfig
from clip_gen.networks.float16_linear import Float16Linear
from clip_gen.networks.kv_cache import KVCache, SummedCache

Step = Callable[[Tensor, tuple[Tensor, ...] | None, KVCache, int], Tensor]  # see Block.stepper


def grid_rotation(side: int, head_size: int) -> Tensor:
    """Cosines and signed sines (2, T, D) that tell a head where in the picture a token lies: half of them turn with
    its row, half with its column, so that what a head learns about neighbours holds everywhere.

    Rotary embedding: arXiv 2104.09864; by row and column, as for pictures: arXiv 2403.13298.
    """
    frequencies = 100.0 ** (-torch.arange(head_size // 4) / (head_size // 4))
    place = torch.arange(side)[:, None] * frequencies  # (side, D / 4)
    rows, columns = place.repeat_interleave(side, dim=0), place.repeat(side, 1)
    angles = torch.cat([rows, columns], dim=1)
    return torch.stack([angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)])


def places_around(side: int) -> Tensor:
    """For each of T places the one before it and those above it, to the left, straight and to the right, (T, 4); T for
    what is outside the picture.
    """
    place = torch.arange(side * side)
    row, column = place // side, place % side
    around = torch.stack([place - 1, place - side - 1, place - side, place - side + 1], dim=1)
    outside = torch.stack([place < 1, (row < 1) | (column < 1), row < 1, (row < 1) | (column > side - 2)], dim=1)
    return torch.where(outside, side * side, around)


def rotate(x: Tensor, rotation: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Turns each pair of channels of x (..., n, D), which lie half of D apart, by its angle in rotation (2, n, D)."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), sine)


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
        # No dropout here, only on what comes out: on a CPU torch has no quick kernel for it.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


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

    def stepper(self) -> Step:
        """A function that does, without dropout, what forward does for one place of each row: the place after those in
        the cache. Takes x (B, n_embd), the rotation, the cache and the number of this layer; returns (B, n_embd).

        For one batch: it keeps references to the weights, because looking them up in an nn.Module takes a CPU as long
        as small operations do, a tenth of the bundled model's time.
        """
        norm_1, norm_2 = (
            partial(torch.layer_norm, normalized_shape=ln.normalized_shape, weight=ln.weight, bias=ln.bias, eps=ln.eps)
            for ln in (self.ln_1, self.ln_2)
        )
        qkv, proj = self.attn.qkv.forward, self.attn.proj.forward
        fc, mlp_proj = self.mlp.fc.forward, self.mlp.proj.forward
        n_head, dtype = self.attn.n_head, self.attn.qkv.bias.dtype

        def step(x: Tensor, rotation: tuple[Tensor, ...] | None, cache: KVCache, layer: int) -> Tensor:
            count, rows = len(x), cache.rows
            heads = qkv(norm_1(x).to(dtype)).view(count, 3, n_head, -1)[:rows]
            q, k, v = heads.unbind(1)  # (rows, H, D) each
            if rotation is not None:
                q, k = rotate(heads[:, :2], rotation).unbind(1)
            y = cache.attend(layer, q, k, v).reshape(rows, -1)
            x = x + proj(y if rows == count else F.pad(y, (0, 0, 0, count - rows)))
            return x + mlp_proj(F.gelu(fc(norm_2(x).to(dtype))))

        return step


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.condition = nn.Linear(config.embed_dim, config.n_embd)
        self.null_condition = nn.Parameter(torch.zeros(config.n_embd)) if config.null_condition else None
        self.token_embedding = nn.Embedding(config.codebook_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.around = nn.Linear(4 * config.n_embd, config.n_embd, bias=False) if config.neighbour_context else None
        self.outside = nn.Parameter(torch.zeros(config.n_embd)) if config.neighbour_context else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.codebook_size, bias=config.head_bias)
        rotation = (
            grid_rotation(math.isqrt(config.block_size), config.n_embd // config.n_head) if config.rotary else None
        )
        self.register_buffer("rotation", rotation, persistent=False)
        places = places_around(math.isqrt(config.block_size)) if config.neighbour_context else None
        self.register_buffer("places_around", places, persistent=False)
        self.register_buffer("neighbours", None, persistent=False)  # set in cast_for_inference
        self.register_buffer("neighbour_starts", None, persistent=False)
        self.apply(self._start)

    def _start(self, module: nn.Module) -> None:
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
        elif module is self:
            # A unit-length embedding has elements of about 1 / sqrt(E); bring its projection to the others' scale.
            nn.init.normal_(self.condition.weight, std=0.5)
            if self.null_condition is not None:
                nn.init.normal_(self.null_condition, std=0.5)
            if self.outside is not None:
                nn.init.normal_(self.outside, std=0.02)

    def prefix(self, embedding: Tensor, unconditional: Tensor | None = None) -> Tensor:
        """What stands at position 0, (B, n_embd).

        embedding: (B, E), unit length. unconditional: (B,) bool; those rows get the learned null condition, which
        training puts in for a tenth of the pictures and guidance pushes away from.
        """
        condition = self.condition(embedding)
        if unconditional is None:
            return condition
        assert self.null_condition is not None, "a transformer without a null condition is never unconditional"
        return torch.where(unconditional[:, None], self.null_condition.to(condition.dtype), condition)

    def forward(
        self,
        embedding: Tensor,
        tokens: Tensor,
        unconditional: Tensor | None = None,
        places: Tensor | None = None,
        chances: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, n + 1, V) for positions 0 to n, given the n first tokens (B, n); n < block_size.

        places: for these positions alone, (B, K) in order, of which the first is always 0: logits (B, K, V), as if the
        others were not there. chances: (B, K), how likely each was to be among them: it counts for as many as are like
        it, so that what attention adds up, and what it divides by, is on average that of the whole.
        """
        assert (places is None) == (chances is None), "places come with their chances"
        assert tokens.shape[1] < self.config.block_size, (tokens.shape, self.config.block_size)
        prefix = self.prefix(embedding, unconditional)
        if places is None:
            x = self._entering(prefix, tokens, slice(0, tokens.shape[1] + 1))
            return self._logits(x, slice(0, x.shape[1]))
        x = self._entering(prefix, tokens, places)
        count = places.shape[1]
        itself = torch.eye(count, dtype=torch.bool, device=x.device)  # which is there whenever it looks
        mask = torch.where(itself, 0.0, -chances.log()[:, None])
        later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        return self._logits(x, places, mask=mask.masked_fill(later, -torch.inf)[:, None].to(self.dtype))

    def _entering(self, prefix: Tensor, tokens: Tensor, places: slice | Tensor) -> Tensor:
        """What goes in at these of the first n + 1 places, (B, K, n_embd), given the n first tokens (B, n)."""
        if self.around is not None:
            outside = self.config.codebook_size
            tokens = F.pad(tokens, (0, self.config.block_size + 1 - tokens.shape[1]), value=outside)
            return self.surrounded(prefix, tokens, self.places_around[places])
        before = tokens if isinstance(places, slice) else tokens.gather(1, places[:, 1:] - 1)
        return torch.cat([prefix[:, None], self.token_embedding(before)], dim=1)

    def surrounded(self, prefix: Tensor, tokens: Tensor, around: Tensor) -> Tensor:
        """What goes in at K places, (B, K, n_embd), with `neighbour_context`: prefix (B, n_embd) and what
        stands at the places `around` each, (K, 4) or (B, K, 4).

        tokens: (B, T + 1), codebook_size where there is none and at T, which stands for outside the picture.
        """
        around = around.expand(len(tokens), -1, -1)
        found = tokens.gather(1, around.flatten(1)).view(around.shape)
        inside = found < self.config.codebook_size
        known = self.token_embedding(found.clamp(max=self.config.codebook_size - 1))
        known = torch.where(inside[..., None], known, self.outside)  # (B, K, 4, n_embd)
        return prefix[:, None] + known[:, :, 0] + self.around(known.flatten(2))

    def surrounded_at(self, place: slice | Tensor, prefix: Tensor, tokens: Tensor) -> Tensor:
        """`surrounded` for a single place, (B, n_embd)."""
        around = self.places_around[place]  # (1, 4)
        if self.neighbours is None:
            return self.surrounded(prefix, tokens, around)[:, 0]
        found = tokens.index_select(1, around[0]) + self.neighbour_starts
        return prefix + F.embedding(found, self.neighbours).sum(dim=1)

    def start(self, prefix: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the first token, from prefix (B, n_embd)."""
        if self.around is None:
            return self.next(prefix, cache)
        shape, outside = (len(prefix), self.config.block_size + 1), self.config.codebook_size
        cache.prefix, cache.tokens = prefix, torch.full(shape, outside, device=prefix.device)
        return self.next(self.surrounded_at(cache.place, prefix, cache.tokens), cache)

    def step(self, token: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the token after `token` (B,), which follows what the cache holds."""
        if self.around is None:
            return self.next(self.token_embedding(token), cache)
        cache.tokens[:, cache.length - 1] = token
        return self.next(self.surrounded_at(cache.place, cache.prefix, cache.tokens), cache)

    def next(self, x: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the token after x (B, n_embd), what goes in next.

        What forward does for one place, without dropout, in fewer calls: a CPU takes longer over those than over what
        is between the products.
        """
        x = x + self.position_embedding.weight[cache.place]
        rotation = None if self.rotation is None else self.rotation[:, cache.place].to(self.dtype).unbind()
        for layer, step in enumerate(cache.steps or self.steppers()):
            x = step(x, rotation, cache, layer)
        cache.advance()
        return self.head(self.ln_f(x))

    def new_cache(self, rows: int) -> KVCache:
        kind = SummedCache if self.cache_dtype == torch.float16 else KVCache
        cache = kind(self.config, rows, device=self.device, dtype=self.cache_dtype)
        cache.steps = self.steppers()
        return cache

    def steppers(self) -> list[Step]:
        return [block.stepper() for block in self.blocks]

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float16 if isinstance(self.head, Float16Linear) else self.dtype

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What goes between the blocks' matrices."""
        return self.blocks[0].attn.qkv.bias.dtype

    def cast_for_inference(self, dtype: torch.dtype) -> GPT:
        """Keeps the matrices of the blocks in this type, and with them the cache; what is added up stays as it is. It
        draws from then on, and is not to be trained.

        float16: the head's too, and the cache. What was made of them cannot be saved, moved or made into another type.
        """

        def kept(linear: nn.Linear) -> nn.Module:
            return Float16Linear(linear) if dtype == torch.float16 else linear.to(dtype)

        for block in self.blocks:
            block.attn.qkv, block.attn.proj = kept(block.attn.qkv), kept(block.attn.proj)
            block.mlp.fc, block.mlp.proj = kept(block.mlp.fc), kept(block.mlp.proj)
        if dtype == torch.float16:
            self.head = kept(self.head)
        if self.around is not None:
            self._know_neighbours()
        return self

    @torch.no_grad()
    def _know_neighbours(self) -> None:
        """What each of the four tokens around adds, whichever it is: (4 · (V + 1), n_embd)."""
        known = torch.cat([self.token_embedding.weight, self.outside[None]])
        added = torch.stack([F.linear(known, part) for part in self.around.weight.chunk(4, dim=1)])
        added[0] += known
        self.neighbours = added.flatten(0, 1)
        self.neighbour_starts = torch.arange(4, device=self.device) * len(known)

    def _logits(self, x: Tensor, places: slice | Tensor, mask: Tensor | None = None) -> Tensor:
        length = x.shape[1]
        # Several threads add up the gradients of indexed rows in any order, those of an embedding in one.
        whole = isinstance(places, slice)
        positions = self.position_embedding.weight[places] if whole else self.position_embedding(places)
        assert positions.shape[-2] == length, (places, self.config.block_size)
        x = self.dropout(x + positions)
        rotation = self.rotation
        if rotation is not None:
            rotation = rotation[:, places].to(self.dtype)
            if rotation.dim() == 4:  # every row has places of its own, and all of its heads the same
                rotation = rotation[:, :, None]
        for block in self.blocks:
            x = block(x, rotation, mask)
        return self.head(self.ln_f(x))


def with_null_condition(gpt: GPT) -> GPT:
    """The same transformer, its weights shared, with a null condition to be learnt in fine-tuning.

    It starts as the condition of an embedding of zeros, which is what a transformer without one knows of nothing.
    """
    if gpt.null_condition is not None:
        return gpt
    weight = gpt.head.weight
    with torch.device("meta"):
        grown = GPT(replace(gpt.config, null_condition=True))
    weights = {**gpt.state_dict(), "null_condition": gpt.condition.bias.detach().clone()}
    grown.load_state_dict(weights, assign=True)
    grown.rotation, grown.places_around = gpt.rotation, gpt.places_around
    return grown.train(gpt.training).requires_grad_(weight.requires_grad)
