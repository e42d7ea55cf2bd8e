"""Teaches CLIP's text tower words that no caption used, from captions with a noun that means nearly the same.

A caption with the new word must have the embedding of the same caption with the known noun. Only the embeddings of
tokens that were never trained (they are zero) change, so that all other captions keep their embeddings exactly, and
pictures too. Unlike fill_unseen_words it also teaches words of several tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.networks.clip_encoder import ClipEncoder

log = logging.getLogger(__name__)

BATCH_SIZE = 128
LEARNING_RATE = 0.03  # at the start; falls to zero. Embeddings have a length of about 0.4
LOGGED_EVERY = 50

CaptionPair = Callable[[np.random.Generator], tuple[str, str]]


def learn_words(encoder: ClipEncoder, captions: CaptionPair, steps: int, seed: int) -> dict[str, object]:
    """captions: for a random generator, a caption with a new word and the same with a known noun.

    Returns how many tokens were trained, and the mean cosine of the two captions in the last LOGGED_EVERY steps.
    """
    table = encoder.clip.token_embedding.weight
    rng = np.random.default_rng(seed)
    new, known = map(encoder.tokenize, zip(*(captions(rng) for _ in range(steps * BATCH_SIZE)), strict=True))
    untrained = torch.unique(new)
    untrained = untrained[~table[untrained].any(dim=1) & (untrained > 0)]  # 0 fills the rows after the end of text
    rows, places = nn.Parameter(torch.zeros(len(untrained), table.shape[1])), torch.full((len(table),), -1)
    places[untrained] = torch.arange(len(untrained))

    def replace_untrained(_: nn.Module, tokens: tuple[Tensor], embedded: Tensor) -> Tensor:
        place = places[tokens[0]]
        return torch.where((place >= 0)[..., None], rows[place.clamp(min=0)], embedded)

    optimizer = torch.optim.Adam([rows], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    cosines = []
    for step, (taught, wanted) in enumerate(zip(new.split(BATCH_SIZE), known.split(BATCH_SIZE), strict=True), start=1):
        with torch.no_grad():
            target = encoder.clip.encode_text(wanted)
        with encoder.clip.token_embedding.register_forward_hook(replace_untrained):
            cosine = F.cosine_similarity(encoder.clip.encode_text(taught), target).mean()
        optimizer.zero_grad()
        (1 - cosine).backward()
        optimizer.step()
        schedule.step()
        cosines.append(cosine.item())
        if step % LOGGED_EVERY == 0:
            log.info("words: step %d of %d, cosine %.3f", step, steps, np.mean(cosines[-LOGGED_EVERY:]))
    with torch.no_grad():
        table[untrained] = rows
    return {"tokens": len(untrained), "cosine": round(float(np.mean(cosines[-LOGGED_EVERY:])), 4)}
