"""Sampling tokens, beside a plain loop without a cache that recomputes the whole sequence for every token.

    script/bench --only sampling [--size bundled published] [--device cpu]

The plain loop runs in float32 with batches of several sizes. It is timed at a few sequence lengths, and the rest is
interpolated: a whole published picture would take minutes. The figures are seconds for a single candidate, beside the
plain loop with a batch of one; and for each of 16 candidates, beside the plain loop with each batch size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import reference
from benchmarks.figures import Figure, seconds
from benchmarks.models import Subject
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens

BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 16, 64)}  # of the plain loop
TIMED_LENGTHS = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # as shares of the longest sequence
LARGE_BATCH = 64  # on a GPU
# At the published size, in bfloat16, an H200 needs 84 ms to read weights and cache for all 256 tokens.
MAX_SECONDS_ON_H200 = 3 * 0.084
MIN_RATIOS = {("published", "cpu"): (13, 40)}  # a single candidate, each of 16


def measure(subject: Subject) -> list[Figure]:
    plain, ours = subject.plain.gpt, subject.ours.gpt
    device, times = subject.device, subject.times
    seconds_of_plain = subject.run(
        lambda: {batch: plain_seconds(plain, device, batch, times) for batch in BATCHES[device.type]}
    )
    return subject.run(lambda: compare(seconds_of_plain, ours, subject), ours=True)


def compare(plain: dict[int, float], gpt: GPT, subject: Subject) -> list[Figure]:
    """Our seconds beside those of the plain loop, which are given by batch size."""
    device, times = subject.device, subject.times
    min_single, min_each = MIN_RATIOS.get((subject.size, device.type), (None, None))
    best = min(plain, key=plain.get)
    figures = [Figure("a single candidate", our_seconds(gpt, device, 1, times), plain[1], min_single)]
    each = our_seconds(gpt, device, 16, times)
    for batch, taken in plain.items():
        name = f"each of 16, plain in batches of {batch}"
        figures.append(Figure(name, each, taken, min_each if batch == best else None))
    if device.type == "cuda":
        limit = MAX_SECONDS_ON_H200 if subject.size == "published" and subject.on_h200 else None
        taken = LARGE_BATCH * our_seconds(gpt, device, LARGE_BATCH, times)
        figures.append(Figure(f"all of {LARGE_BATCH}", taken, LARGE_BATCH * plain[best], max_seconds=limit))
    return figures


@torch.inference_mode()
def plain_seconds(gpt: GPT, device: torch.device, batch: int, times: int) -> float:
    """Seconds per candidate of the plain loop with this batch size."""
    embedding = F.normalize(torch.randn(batch, gpt.config.embed_dim, device=device), dim=1)
    uniform = torch.rand(batch, device=device)
    longest = gpt.config.block_size - 1
    lengths = sorted({round(longest * share) for share in TIMED_LENGTHS})
    taken = []
    for length in lengths:
        tokens = torch.randint(0, gpt.config.codebook_size, (batch, length), device=device)

        def step(tokens: torch.Tensor = tokens) -> torch.Tensor:
            return reference.draw(reference.next_logits(gpt, embedding, tokens), uniform)

        taken.append(seconds(step, device, times))
    return float(np.interp(range(longest + 1), lengths, taken).sum()) / batch


@torch.inference_mode()
def our_seconds(gpt: GPT, device: torch.device, count: int, times: int) -> float:
    """Seconds per candidate of our sampler with this many candidates."""
    embedding = F.normalize(torch.randn(1, gpt.config.embed_dim, device=device), dim=1).expand(count, -1)
    uniforms = candidate_uniforms(0, range(count), gpt.config.block_size)
    return seconds(lambda: sample_tokens(gpt, embedding, uniforms, Sampling()), device, times) / count
