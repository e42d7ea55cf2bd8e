"""Embeddings between others: of prompts with weights, and of a prompt and a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.completions import completed, needed
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.prompts import parse_prompt

NEARLY_PARALLEL = 1e-4  # radians


def embed_prompt(clip: ClipEncoder, bridge: Bridge, prompt: str) -> Tensor:
    """A prompt's embedding (1, E), moved by the bridge; of a prompt with weights the mean of its parts."""
    parts = parse_prompt(prompt)
    embeddings = bridge(clip.encode_text([part.text for part in parts]))
    return weighted_mean(embeddings, [part.weight for part in parts])


def prompt_conditions(clip: ClipEncoder, bridge: Bridge, prompt: str, embedding: Tensor, chances: Tensor) -> Tensor:
    """What K candidates of a prompt are drawn from, (K, E).

    embedding: (1, E), of embed_prompt. chances: (K,) in [0, 1), which picture or completion each candidate gets.
    Candidates are drawn from the completed prompt if no picture in the bridge's memory fits, or if words are replaced.
    A prompt that is then too long for the CLIP is not completed.
    """
    parts = parse_prompt(prompt)
    completions = needed([part.text for part in parts], bridge.config.completions)
    if any(completion.replaces for completion in completions) or (completions and not bridge.fits(embedding)):
        chosen = [tuple(completed(part.text, completions, chance) for part in parts) for chance in chances.tolist()]
        different = dict.fromkeys(text for texts in chosen for text in texts)
        if not any(map(clip.tokenize.left_out, different)):
            embeddings = {text: bridge(clip.encode_text([text])) for text in different}
            weights = [part.weight for part in parts]
            return torch.cat(
                [weighted_mean(torch.cat([embeddings[text] for text in texts]), weights) for texts in chosen]
            )
    return bridge.conditions(embedding, chances[None])


def weighted_mean(embeddings: Tensor, weights: Sequence[float]) -> Tensor:
    """The mean of embeddings (n, E) with these weights, as one embedding (1, E) of unit length.

    A single embedding stays as it is. ValueError for embeddings that cancel out.
    """
    if len(embeddings) == 1:
        return embeddings
    mean = (embeddings * embeddings.new_tensor(weights)[:, None]).sum(dim=0, keepdim=True)
    if not mean.norm() > 1e-6:
        raise ValueError("the parts of the prompt cancel out for this model's CLIP; change their weights")
    return F.normalize(mean, dim=-1)


def slerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Spherical interpolation between embeddings (1, E) of unit length: exactly `start` at 0 and `end` at 1."""
    if weight in (0, 1):
        return end if weight else start
    a, b = start.double(), end.double()
    angle = torch.atan2((a - b).norm(), (a + b).norm()) * 2  # the arc cosine is inexact for small angles
    if angle < NEARLY_PARALLEL or angle > torch.pi - NEARLY_PARALLEL:
        return F.normalize(torch.lerp(start, end, weight), dim=-1)
    mixed = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return F.normalize(mixed, dim=-1).to(start.dtype)
