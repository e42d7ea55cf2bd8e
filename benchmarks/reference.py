"""The plain reference: the same weights in float32, in the simplest implementation.

There is no cache: every token recomputes the whole sequence. Pictures are decoded and embedded in one batch, in
torch's default memory format.
"""

from __future__ import annotations

import math
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


def load(folder: Path, device: torch.device) -> Networks:
    """The networks, initialised at random by torch and then loaded from the files."""
    networks = build(load_config(folder))
    for part in PARTS:
        network = getattr(networks, part)
        network.load_state_dict(load_file(folder / f"{part}.safetensors"))
        network.to(device).eval().requires_grad_(False)
    return networks


def next_logits(gpt: GPT, embedding: Tensor, tokens: Tensor) -> Tensor:
    """Logits (B, V) of the token after tokens (B, n), from the whole sequence."""
    x = inputs(gpt, gpt.condition(embedding)[:, None], gpt.token_embedding(tokens))
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


def inputs(gpt: GPT, condition: Tensor, before: Tensor) -> Tensor:
    """The blocks' input (B, n + 1, n_embd), from the condition (B, 1, n_embd) and n token embeddings."""
    if gpt.around is None:
        return torch.cat([condition, before], dim=1)
    known = torch.cat([before, gpt.outside.expand(len(before), 1, -1)], dim=1)  # last: outside the picture
    side, around = math.isqrt(gpt.config.block_size), []
    for place in range(known.shape[1]):
        row, column = divmod(place, side)
        left, right = row and column, row and column < side - 1
        above = (place - side - 1 if left else -1, place - side if row else -1, place - side + 1 if right else -1)
        around.append((place - 1, *above))
    seen = known[:, around]  # (B, n + 1, 4, n_embd)
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
def sample(gpt: GPT, embedding: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (B, T) for embedding (B, E), each chosen by its uniform (B, T) in [0, 1)."""
    tokens = torch.empty(len(uniforms), 0, dtype=torch.long, device=embedding.device)
    for t in range(uniforms.shape[1]):
        token = draw(next_logits(gpt, embedding, tokens), uniforms[:, t])
        tokens = torch.cat([tokens, token[:, None]], dim=1)
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
def predict(networks: Networks, prompt: str, seed: int, folder: Path, candidates: int = 16, best: int = 4) -> None:
    """Writes the best pictures of a prompt to the folder, best first."""
    text = networks.bridge(networks.clip.encode_text([prompt]))
    embedding = text.expand(candidates, -1)
    uniforms = candidate_uniforms(seed, range(candidates), networks.config.gpt.block_size).to(embedding.device)
    images, scores = decode_and_score(networks, sample(networks.gpt, embedding, uniforms), text)
    for i, picture in enumerate(to_pil(images[scores.topk(best).indices])):
        picture.save(folder / f"out-{i}.png")
