"""Drawing tokens, beside a plain loop that recomputes the whole sequence for every token.

    script/bench --only sampling [--size bundled published] [--device cpu]

The plain loop is float32, without a cache, in batches of several sizes; a published picture takes it minutes, so it is
timed at a few lengths and the rest is read off the line between them. Seconds for one candidate alone, beside the plain
loop with a batch of one, and for each of sixteen, beside each batch size of the plain loop; its best is what counts. On
a CPU also with matrices in int8, which is made for one candidate alone; of the two ways the quicker has the bar.
"""

from __future__ import annotations

import copy

import numpy as np
import plain
import torch
from figures import Figure, seconds
from subjects import Subject
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens

BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 16, 64)}  # of the plain loop
SHARES = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the last length, at which it is timed
MOST_ROWS = 64  # in a batch on a GPU
# At the published size, in bfloat16, an H200's memory takes 84 ms to hand out weights and cache for all 256 tokens.
MOST_SECONDS_ON_H200 = 3 * 0.084
BARS = {("published", "cpu"): ((13, 20), (40, 60))}  # least and hoped for: one alone, each of sixteen


def measure(subject: Subject) -> list[Figure]:
    theirs, ours = subject.plain.gpt, subject.ours.gpt
    device, times = subject.device, subject.times
    reference = subject.run(
        lambda: {batch: plain_seconds(theirs, device, batch, times) for batch in BATCHES[device.type]}
    )
    return subject.run(lambda: beside(reference, theirs, ours, subject), ours=True)


def beside(reference: dict[int, float], theirs: GPT, ours: GPT, subject: Subject) -> list[Figure]:
    """Ours beside the seconds of the plain loop, by its batch sizes."""
    device, times = subject.device, subject.times
    one, sixteen = (our_seconds(ours, device, count, times) for count in (1, 16))
    alone, together = BARS.get((subject.size, device.type), ((), ()))
    best = min(reference, key=reference.get)
    ones, others = {"one candidate alone": one}, []
    if device.type == "cuda":
        most = MOST_SECONDS_ON_H200 if subject.size == "published" and subject.on_h200 else None
        taken = MOST_ROWS * our_seconds(ours, device, MOST_ROWS, times)
        others = [Figure(f"all of {MOST_ROWS}", taken, MOST_ROWS * reference[best], most_seconds=most)]
    else:
        gpt = copy.deepcopy(theirs).cast_for_inference(torch.int8)
        ones["one candidate alone, int8"] = our_seconds(gpt, device, 1, times)
        others = [Figure("each of 16, int8", our_seconds(gpt, device, 16, times), reference[best])]
    quickest = min(ones, key=ones.get)
    return [
        *(Figure(name, taken, reference[1], *(alone if name == quickest else ())) for name, taken in ones.items()),
        *(
            Figure(f"each of 16, plain in batches of {batch}", sixteen, taken, *(together if batch == best else ()))
            for batch, taken in reference.items()
        ),
        *others,
    ]


@torch.inference_mode()
def plain_seconds(gpt: GPT, device: torch.device, batch: int, times: int) -> float:
    """Seconds a candidate takes the plain loop in batches of this size."""
    embedding = F.normalize(torch.randn(batch, gpt.config.embed_dim, device=device), dim=1)
    uniform = torch.rand(batch, device=device)
    longest = gpt.config.block_size - 1
    lengths = sorted({round(longest * share) for share in SHARES})
    taken = []
    for length in lengths:
        tokens = torch.randint(0, gpt.config.codebook_size, (batch, length), device=device)

        def step(tokens: torch.Tensor = tokens) -> torch.Tensor:
            return plain.draw(plain.next_logits(gpt, embedding, tokens), uniform)

        taken.append(seconds(step, device, times))
    return float(np.interp(range(longest + 1), lengths, taken).sum()) / batch


@torch.inference_mode()
def our_seconds(gpt: GPT, device: torch.device, count: int, times: int) -> float:
    """Seconds a candidate takes our sampler when it draws this many."""
    embedding = F.normalize(torch.randn(1, gpt.config.embed_dim, device=device), dim=1).expand(count, -1)
    uniforms = candidate_uniforms(0, range(count), gpt.config.block_size)
    return seconds(lambda: sample_tokens(gpt, embedding, uniforms, Sampling()), device, times) / count
