"""How well pictures fit their prompts, by the embeddings of a CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHOICES = 100  # of R-precision: the picture's own prompt and 99 others


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each picture and its prompt, at least 0, (N,), of unit embeddings (N, E); the scale of
    torchmetrics. CLIPScore as published is 2.5 times the cosine, arXiv 2104.08718.
    """
    return 100 * (images * texts).sum(dim=1).clamp(min=0)


def retrieved(images: Tensor, texts: Tensor, prompts: Sequence[str], seed: int = 0) -> Tensor:
    """For each picture whether its own prompt is nearer than up to 99 random other prompts, (N,) bool: R-precision,
    arXiv 1711.10485, with CLIP, arXiv 2011.12836. Prompts of equal text are no alternatives.
    """
    rng, found = np.random.default_rng(seed), []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        # Twice as many as needed are drawn, since some may be of equal text.
        drawn = rng.permutation(len(prompts))[: 2 * CHOICES]
        others = [j for j in drawn if prompts[j] != prompt][: CHOICES - 1]
        found.append(bool((texts[others] @ image < texts[i] @ image).all()))
    return torch.tensor(found, dtype=torch.bool)
