"""Decoding and ranking, loading, and a whole prediction, each beside the plain reference.

script/bench --only decoding loading prediction [--size bundled published] [--device cpu]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks import reference
from benchmarks.figures import Figure, seconds
from benchmarks.models import PROMPT, Subject
from clip_gen import ClipGen
from clip_gen.serving.outputs import Outputs

CANDIDATES = 16
MAX_SECONDS = 1.5  # for a prediction of the bundled model
LARGE_BATCH, MAX_SECONDS_ON_H200 = 64, 0.5  # at the published size


def decoding(subject: Subject) -> list[Figure]:
    """Decodes and scores the tokens of 16 candidates; ours in the batches of pipeline.py, plain in one batch.

    On a GPU also a whole prediction of 64 candidates.
    """
    theirs, ours, device = subject.plain, subject.ours, subject.device
    gpt = ours.config.gpt
    tokens = torch.randint(0, gpt.codebook_size, (CANDIDATES, gpt.block_size), device=device)
    text = subject.run(lambda: ours.embed_prompt(PROMPT), ours=True)

    def work() -> float:
        parts = tokens.split(ours.at_a_time)
        return seconds(lambda: [ours.decode_and_score(some, text) for some in parts], device, subject.times)

    each = subject.run(work, ours=True)
    batch = subject.run(
        lambda: seconds(lambda: reference.decode_and_score(theirs, tokens, text), device, subject.times)
    )
    figures = [Figure(f"decoding and ranking {CANDIDATES}", each, batch)]
    if device.type == "cuda":
        taken = seconds(lambda: ours.generate(PROMPT, candidates=LARGE_BATCH, seed=0), device, subject.times)
        limit = MAX_SECONDS_ON_H200 if subject.size == "published" and subject.on_h200 else None
        figures.append(Figure(f"{LARGE_BATCH} candidates, prompt to ranked pictures", taken, max_seconds=limit))
    return figures


def loading(subject: Subject) -> list[Figure]:
    """Loads the model folder, whose files are in the page cache."""
    folder, device, times = subject.folder, subject.device, subject.times
    theirs = subject.run(lambda: seconds(lambda: reference.load(folder, device), device, times))
    return [Figure("loading", seconds(lambda: ClipGen.load(folder, device.type), device, times), theirs)]


def prediction(subject: Subject) -> list[Figure]:
    """16 candidates, of which the 4 best are saved, as in predict.py."""
    theirs, ours, device, times = subject.plain, subject.ours, subject.device, subject.times
    settings = {"prompt": PROMPT, "candidates": CANDIDATES, "model": ours.config.name}
    with tempfile.TemporaryDirectory() as folder:
        outputs = Outputs(Path(folder, "ours"))

        def predict() -> None:
            outputs.save(ours.generate(PROMPT, candidates=CANDIDATES, seed=0), settings, "png", 90)

        def plain_seconds(loop: reference.Loop) -> float:
            return subject.run(
                lambda: seconds(lambda: reference.predict(theirs, PROMPT, 0, Path(folder), loop), device, times)
            )

        plain, slow = plain_seconds(reference.sample), plain_seconds(reference.sample_without_cache)
        taken = seconds(predict, device, times)
    name = f"a prediction of {CANDIDATES}, prompt to files"
    return [Figure(name, taken, plain, max_seconds=MAX_SECONDS, others={"without a cache": slow})]
