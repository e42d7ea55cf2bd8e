"""The inception score: how certain InceptionV3 is of what single pictures show, and how much different ones differ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PARTS = 10  # as published


def inception_score(features: Tensor, classify: Callable[[Tensor], Tensor], seed: int = 0) -> Tensor:
    """exp of the mean KL divergence of a picture's classes from those of all, in each of ten random parts, (10,)
    float64. The score is their mean, arXiv 1606.03498: from 1, for pictures that look all the same, to the number of
    classes.

    features: (N, D), N at least 10. classify: features to logits (N, C), which are kept for one part at a time. Small
    sets have a lower score.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    scores = []
    for rows in order.tensor_split(PARTS):
        logs = classify(features[rows]).double().log_softmax(dim=1)
        of_all = logs.logsumexp(dim=0) - logs.new_tensor(len(logs)).log()
        scores.append((logs.exp() * (logs - of_all)).sum(dim=1).mean().exp())
    return torch.stack(scores)
