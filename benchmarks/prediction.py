"""Decoding and ranking, loading, and a whole prediction in a warm process, each beside the plain reference.

script/bench --only decoding loading prediction [--size bundled published] [--device cpu]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import plain
import torch
from figures import Figure, seconds
from subjects import PROMPT, Subject

from clip_gen import ClipGen
from clip_gen.serving.model_cache import Outputs

CANDIDATES = 16
MOST_SECONDS = 1.5  # for a prediction of the bundled model
MANY, MOST_SECONDS_ON_H200 = 64, 0.5  # candidates of the published size


def decoding(subject: Subject) -> list[Figure]:
    """Pictures of sixteen candidates' tokens and their scores: ours as many at a time as pipeline.py has it, plain all.

    On a GPU also all that many candidates take, in a warm process.
    """
    theirs, ours, device = subject.plain, subject.ours, subject.device

    gpt = ours.config.gpt
    tokens = torch.randint(0, gpt.codebook_size, (CANDIDATES, gpt.block_size), device=device)
    text = subject.run(lambda: ours.embed_prompt(PROMPT), ours=True)

    def work() -> float:
        parts = tokens.split(ours.at_a_time)
        return seconds(lambda: [ours.decode_and_score(some, text) for some in parts], device, subject.times)

    each = subject.run(work, ours=True)
    batch = subject.run(lambda: seconds(lambda: plain.look(theirs, tokens, text), device, subject.times))
    found = [Figure(f"decoding and ranking {CANDIDATES}", each, batch)]
    if device.type == "cuda":
        taken = seconds(lambda: ours.generate(PROMPT, candidates=MANY, seed=0), device, subject.times)
        most = MOST_SECONDS_ON_H200 if subject.size == "published" and subject.on_h200 else None
        found.append(Figure(f"{MANY} candidates, prompt to ranked pictures", taken, most_seconds=most))
    return found


def loading(subject: Subject) -> list[Figure]:
    """The model folder to networks that are ready, its files in the system's cache."""
    folder, device, times = subject.folder, subject.device, subject.times
    theirs = subject.run(lambda: seconds(lambda: plain.load(folder, device), device, times))
    return [Figure("loading", seconds(lambda: ClipGen.load(folder, device.type), device, times), theirs)]


def whole(subject: Subject) -> list[Figure]:
    """Sixteen candidates, the four best to files, as predict.py does it."""
    theirs, ours, device, times = subject.plain, subject.ours, subject.device, subject.times
    outputs, settings = Outputs(), {"prompt": PROMPT, "candidates": CANDIDATES, "model": ours.config.name}

    def predict() -> None:
        outputs.save(ours.generate(PROMPT, candidates=CANDIDATES, seed=0), settings, "png", 90)

    with tempfile.TemporaryDirectory() as folder:

        def reference() -> None:
            plain.predict(theirs, PROMPT, 0, Path(folder), CANDIDATES)

        slow = subject.run(lambda: seconds(reference, device, times))
    name = f"a prediction of {CANDIDATES}, prompt to files"
    return [Figure(name, seconds(predict, device, times), slow, most_seconds=MOST_SECONDS)]
