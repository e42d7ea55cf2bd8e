"""Sampling tokens, beside a plain float32 loop with a cache of keys and values, and one without a cache.

    script/bench --only sampling [--size bundled published] [--device cpu]

The plain loops run with batches of several sizes; on a GPU the one with a cache also under torch.compile, and its
seconds lead. The loop without a cache is timed at a few sequence lengths, and the rest is interpolated: a whole
published picture would take minutes. The figures are seconds for a single candidate, beside the plain loops with a
batch of one; and for each of 16 candidates, beside the plain loops with each batch size.
"""

from __future__ import annotations

from collections.abc import Callable

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


def measure(subject: Subject) -> list[Figure]:
    plain, ours, device, times = subject.plain.gpt, subject.ours.gpt, subject.device, subject.times

    def by_batch(taken: Callable[[GPT, torch.device, int, int], float]) -> dict[int, float]:
        return subject.run(lambda: {batch: taken(plain, device, batch, times) for batch in BATCHES[device.type]})

    loops = {"compiled": by_batch(compiled_seconds)} if device.type == "cuda" else {}
    loops |= {"with a cache": by_batch(plain_seconds), "without a cache": by_batch(seconds_without_cache)}
    return subject.run(lambda: compare(loops, ours, subject), ours=True)


def compare(loops: dict[str, dict[int, float]], gpt: GPT, subject: Subject) -> list[Figure]:
    """Our seconds beside those of the plain loops, which are given by name and batch size; the first one leads."""
    device, times = subject.device, subject.times
    leading, *others = loops

    def figure(name: str, ours: float, batch: int) -> Figure:
        return Figure(name, ours, loops[leading][batch], others={other: loops[other][batch] for other in others})

    each = our_seconds(gpt, device, 16, times)
    figures = [figure("a single candidate", our_seconds(gpt, device, 1, times), 1)]
    figures += [figure(f"each of 16, plain in batches of {batch}", each, batch) for batch in loops[leading]]
    if device.type == "cuda":
        limit = MAX_SECONDS_ON_H200 if subject.size == "published" and subject.on_h200 else None
        best = [LARGE_BATCH * min(taken.values()) for taken in loops.values()]
        taken = LARGE_BATCH * our_seconds(gpt, device, LARGE_BATCH, times)
        slower = dict(zip(others, best[1:], strict=True))
        figures.append(Figure(f"all of {LARGE_BATCH}", taken, best[0], max_seconds=limit, others=slower))
    return figures


def plain_seconds(gpt: GPT, device: torch.device, batch: int, times: int, blocks: Callable | None = None) -> float:
    """Seconds per candidate of the plain loop with a cache with this batch size."""
    embedding = F.normalize(torch.randn(batch, gpt.config.embed_dim, device=device), dim=1)
    uniforms = torch.rand(batch, gpt.config.block_size, device=device)
    return seconds(lambda: reference.sample(gpt, embedding, uniforms, blocks), device, times) / batch


def compiled_seconds(gpt: GPT, device: torch.device, batch: int, times: int) -> float:
    torch.compiler.reset()
    return plain_seconds(gpt, device, batch, times, torch.compile(reference.cached_blocks, mode="reduce-overhead"))


@torch.inference_mode()
def seconds_without_cache(gpt: GPT, device: torch.device, batch: int, times: int) -> float:
    """Seconds per candidate of the plain loop without a cache with this batch size."""
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
