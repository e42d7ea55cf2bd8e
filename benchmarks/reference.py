"""The plain reference: the same weights in float32, in the simplest implementation.

Tokens come from a loop with a cache of keys and values, as one would write it after nanoGPT: `sample`. The slow loop
that the authors published has no cache, so every token recomputes the whole sequence: `sample_without_cache`.
Pictures are decoded and embedded in one batch, in torch's default memory format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from clip_gen.hardware import tensor_float32
from clip_gen.images import for_clip, to_pil
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import candidate_uniforms
from clip_gen.weights.model_folder import PARTS, Networks, build, load_config

Loop = Callable[[GPT, Tensor, Tensor], Tensor]  # `sample` or `sample_without_cache`


def load(folder: Path, device: torch.device) -> Networks:
    """The networks, initialised at random by torch and then loaded from the files."""
    networks = build(load_config(folder))
    for part in PARTS:
        network = getattr(networks, part)
        network.load_state_dict(load_file(folder / f"{part}.safetensors"))
        network.to(device).eval().requires_grad_(False)
    return networks


class Cache:
    """Keys and values of earlier positions of a batch, and what is known of its pictures.

    all_positions: attend to the whole cache and mask what is not there yet, so that shapes never change: for
    torch.compile.
    """

    def __init__(self, gpt: GPT, embedding: Tensor, all_positions: bool = False):
        config = gpt.config
        shape = config.n_layer, len(embedding), config.n_head, config.block_size, config.n_embd // config.n_head
        self.keys = torch.zeros(shape, device=embedding.device)
        self.values = torch.zeros_like(self.keys)
        self.condition = gpt.condition(embedding)[:, None]  # (B, 1, n_embd)
        self.sketched = None if gpt.sketch is None else gpt.sketched(self.condition[:, 0])
        self.all_positions = all_positions


def cached_logits(
    gpt: GPT, cache: Cache, tokens: Tensor, blocks: Callable[[GPT, Cache, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """Logits (B, V) of the token after tokens (B, n); those before the last were given to earlier calls.

    blocks: `cached_blocks`, or the same compiled.
    """
    place = tokens.shape[1]
    x = inputs(gpt, cache.condition, tokens, [place]) + gpt.position_embedding.weight[place]
    if cache.sketched is not None:
        x = x + cache.sketched[:, place, None]
    end = cache.keys.shape[3] if cache.all_positions else place + 1
    return blocks(gpt, cache, x, torch.tensor([place], device=x.device), end)


def cached_blocks(gpt: GPT, cache: Cache, x: Tensor, place: Tensor, end: int) -> Tensor:
    """Logits (B, V) for the input x (B, 1, n_embd) of one place, (1,), which attends to those before `end`."""
    batch, _, width = x.shape
    seen = (torch.arange(end, device=x.device) <= place)[None] if cache.all_positions else None
    for block, all_keys, all_values in zip(gpt.blocks, cache.keys, cache.values, strict=True):
        q, k, v = block.attn.qkv(block.ln_1(x)).view(batch, 1, 3, gpt.config.n_head, -1).permute(2, 0, 3, 1, 4)
        if gpt.rotation is not None:
            q, k = (rotate(channels, gpt.rotation[:, place]) for channels in (q, k))
        all_keys.index_copy_(2, place, k)
        all_values.index_copy_(2, place, v)
        y = F.scaled_dot_product_attention(q, all_keys[:, :, :end], all_values[:, :, :end], seen)
        x = x + block.attn.proj(y.transpose(1, 2).reshape(batch, 1, width))
        x = x + block.mlp.proj(F.gelu(block.mlp.fc(block.ln_2(x))))
    return gpt.head(gpt.ln_f(x))[:, 0]


def next_logits(gpt: GPT, embedding: Tensor, tokens: Tensor) -> Tensor:
    """Logits (B, V) of the token after tokens (B, n), from the whole sequence."""
    x = inputs(gpt, gpt.condition(embedding)[:, None], tokens, range(tokens.shape[1] + 1))
    batch, length, width = x.shape
    x = x + gpt.position_embedding.weight[:length]
    if gpt.sketch is not None:
        x = x + gpt.sketched(gpt.condition(embedding))[:, :length]
    for block in gpt.blocks:
        heads = block.attn.qkv(block.ln_1(x)).view(batch, length, 3, gpt.config.n_head, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, n + 1, D) each
        if gpt.rotation is not None:
            q, k = (rotate(channels, gpt.rotation[:, :length]) for channels in (q, k))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.proj(seen.transpose(1, 2).reshape(batch, length, width))
        x = x + block.mlp.proj(F.gelu(block.mlp.fc(block.ln_2(x))))
    return gpt.head(gpt.ln_f(x))[:, -1]


def inputs(gpt: GPT, condition: Tensor, tokens: Tensor, places: Sequence[int]) -> Tensor:
    """The blocks' inputs (B, K, n_embd) at K places, from the condition (B, 1, n_embd) and the tokens before them."""
    if gpt.around is None:
        before = gpt.token_embedding(tokens[:, max(places[0] - 1, 0) : places[-1]])
        return torch.cat([condition, before], dim=1) if places[0] == 0 else before
    known = torch.cat([gpt.token_embedding(tokens), gpt.outside.expand(len(tokens), 1, -1)], dim=1)
    side, around = math.isqrt(gpt.config.block_size), []
    for place in places:
        row, column = divmod(place, side)
        left, right = row and column, row and column < side - 1
        above = (place - side - 1 if left else -1, place - side if row else -1, place - side + 1 if right else -1)
        around.append((place - 1, *above))  # -1: outside the picture
    seen = known[:, around]  # (B, K, 4, n_embd)
    return condition + seen[:, :, 0] + gpt.around(seen.flatten(2))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates channel pairs of x (..., n, D), half of D apart, by the cosines and signed sines (2, n, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat([second, first], dim=-1) * rotation[1]


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the running sum of the probabilities of logits (B, V) passes uniform (B,) in [0, 1)."""
    passed = logits.softmax(dim=1).cumsum(dim=1) <= uniform[:, None]
    return passed.sum(dim=1).clamp(max=logits.shape[1] - 1)


@torch.inference_mode()
def sample(gpt: GPT, embedding: Tensor, uniforms: Tensor, blocks: Callable | None = None) -> Tensor:
    """Tokens (B, T) for embedding (B, E), each chosen by its uniform (B, T) in [0, 1). blocks: compiled ones."""
    cache = Cache(gpt, embedding, all_positions=blocks is not None)
    return draw_all(lambda tokens: cached_logits(gpt, cache, tokens, blocks or cached_blocks), uniforms)


@torch.inference_mode()
def sample_without_cache(gpt: GPT, embedding: Tensor, uniforms: Tensor) -> Tensor:
    """The same tokens as `sample`, from the whole sequence each."""
    return draw_all(lambda tokens: next_logits(gpt, embedding, tokens), uniforms)


def draw_all(logits: Callable[[Tensor], Tensor], uniforms: Tensor) -> Tensor:
    """Tokens (B, T), one after another; logits: (B, V), of the token after those it is given."""
    tokens = torch.empty(len(uniforms), 0, dtype=torch.long, device=uniforms.device)
    for uniform in uniforms.unbind(1):
        tokens = torch.cat([tokens, draw(logits(tokens), uniform)[:, None]], dim=1)
    return tokens


@torch.inference_mode()
def decode_and_score(networks: Networks, tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) of tokens (B, T), and their CLIP cosines (B,) with the text embedding (1, E)."""
    vqgan, clip = networks.vqgan, networks.clip
    codes = vqgan.quantizer.lookup(tokens).transpose(1, 2)  # (B, C, T)
    codes = codes.unflatten(2, (vqgan.config.grid, vqgan.config.grid)).contiguous()
    with tensor_float32(tokens.device, False):  # TF32 would round the convolutions
        images = F.pixel_shuffle(vqgan.decoder(vqgan.post_quant_conv(codes)), vqgan.config.patch).clamp(-1, 1)
        embeddings = clip.clip.encode_image(for_clip(images, clip.config.image_resolution))
    return images, F.normalize(embeddings, dim=1) @ text[0]


@torch.inference_mode()
def predict(networks: Networks, prompt: str, seed: int, folder: Path, loop: Loop = sample) -> None:
    """Writes the 4 best of 16 pictures of a prompt to the folder, best first."""
    text = networks.bridge(networks.clip.encode_text([prompt]))
    embedding = text.expand(16, -1)
    uniforms = candidate_uniforms(seed, range(16), networks.config.gpt.block_size).to(embedding.device)
    images, scores = decode_and_score(networks, loop(networks.gpt, embedding, uniforms), text)
    for i, picture in enumerate(to_pil(images[scores.topk(4).indices])):
        picture.save(folder / f"out-{i}.png")
