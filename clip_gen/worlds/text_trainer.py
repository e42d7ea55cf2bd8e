"""Brings the embeddings of CLIP's text tower closer to those of its image tower.

The contrast of CLIP's own training wants a text nearer to its picture than to others, and leaves a gap between the two
(arXiv 2203.02053). A transformer that has learnt from pictures' embeddings then misreads texts. Here the image tower
stays as it is, and a caption must have the mean embedding of the pictures that it fits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.hardware import prefers_bfloat16
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.training.stage import FitConfig, Muon

log = logging.getLogger(__name__)

BATCH_SIZE = 256
LEARNING_RATE, MUON_RATE = 1e-3, 4e-3  # at the start; they fall along a cosine to zero
WARMUP = 20  # steps
LOGGED_EVERY = 50


def align_texts(
    encoder: ClipEncoder, embeddings: np.ndarray, captions: Callable[[int], tuple[str, ...]], steps: int, seed: int
) -> dict[str, object]:
    """Trains the text tower. embeddings: of N pictures, (N, E). captions: those of a picture by its number.

    Returns the mean cosine of captions and pictures in the last LOGGED_EVERY steps.
    """
    tower = {
        name: parameter.requires_grad_(True)
        for name, parameter in encoder.clip.named_parameters()
        if not name.startswith("visual.") and name != "logit_scale"
    }
    matrices = [tower[name] for name in tower if name.startswith("transformer.") and tower[name].dim() == 2]
    config = FitConfig(steps=steps, learning_rate=LEARNING_RATE, muon_rate=MUON_RATE, weight_decay=0.0)
    # Words without a gradient stay zero.
    optimizer = Muon(encoder.clip, [*matrices, encoder.clip.text_projection], config)
    rates = [group["lr"] for group in optimizer.param_groups]
    device, rng, cosines = encoder.clip.logit_scale.device, np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        rate = min(1.0, step / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, highest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = highest * rate
        numbers = rng.integers(len(embeddings), size=BATCH_SIZE)
        texts = [rng.choice(captions(int(number))) for number in numbers]
        wanted = torch.from_numpy(embeddings[numbers].astype(np.float32)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=prefers_bfloat16(device, training=True)):
            found: Tensor = encoder.clip.encode_text(encoder.tokenize(texts).to(device))
        cosine = F.cosine_similarity(found.float(), wanted).mean()
        optimizer.zero_grad()
        (1 - cosine).backward()
        optimizer.step()
        cosines.append(cosine.item())
        if step % LOGGED_EVERY == 0:
            log.info("text: step %d of %d, cosine %.3f", step, steps, np.mean(cosines[-LOGGED_EVERY:]))
    return {"cosine": round(float(np.mean(cosines[-LOGGED_EVERY:])), 4)}
