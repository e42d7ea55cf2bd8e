"""Masks on the bundled model: one of two objects is replaced by another.

    .venv/bin/python -m benchmarks masks [--scenes 300]

The judge grades the best of 16 candidates, with the kept pixels pasted in. Then the candidate's tokens are decoded
without that, and a band of 4 pixels around the mask is compared with the original. Writes the results to a JSON file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.figures import RESULTS, machine
from benchmarks.models import BUNDLED
from clip_gen import ClipGen
from clip_gen.files import write_text_atomic
from clip_gen.images import to_pil
from clip_gen.metrics.intervals import Share
from clip_gen.worlds.shapes.captions import Description, caption, describe
from clip_gen.worlds.shapes.judge import read, satisfies
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import COLOURS, OBJECT_SIZES, SHAPES, another, sample_scene

CANDIDATES = 16
SEED = 34  # of the scenes
MARGIN = 3  # pixels of the mask around an object's bounding square; the other object is further away
BAND = 4  # pixels around the mask
MIN_SHARE, MIN_DECIBELS = 0.80, 25.0  # the targets


@dataclass(frozen=True)
class Case:
    """A scene, what it should show after one object was replaced, and the mask, (S, S) bool."""

    picture: np.ndarray  # (S, S, 3) uint8
    wanted: Description
    mask: np.ndarray


def case(number: int, side: int) -> Case:
    rng = np.random.default_rng([SEED, number])
    scene = sample_scene(rng, count=2)
    replaced = int(rng.integers(2))
    old, other = scene.items[replaced], scene.items[1 - replaced]
    while True:
        size = str(rng.choice(list(OBJECT_SIZES))) if old.size == "large" else "small"
        new = replace(old, shape=another(rng, SHAPES, old.shape), colour=another(rng, COLOURS, old.colour), size=size)
        if not new.held_out and new.look != other.look:
            break
    mask = np.zeros((side, side), bool)
    left, right, top, bottom = (
        max(0, round((centre + sign * old.radius) * side + sign * MARGIN))
        for centre in (old.x, old.y)
        for sign in (-1, 1)
    )
    mask[top:bottom, left:right] = True
    return Case(render(scene, side), describe(scene.with_item(replaced, new)), mask)


def band_error(picture: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """The mean squared error, in levels of 255, in a band around the mask."""
    around = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * BAND + 1, stride=1, padding=BAND)[0].numpy() > 0
    return float(((picture.astype(float) - original)[around & ~mask] ** 2).mean())


def measure(model: ClipGen, scenes: int) -> dict[str, object]:
    verdicts, errors = [], []
    for number in range(scenes):
        one = case(number, model.config.vqgan.resolution)
        asked = {"candidates": CANDIDATES, "num_outputs": CANDIDATES, "seed": number}
        pictures = {"init_image": Image.fromarray(one.picture), "mask": Image.fromarray(one.mask)}
        result = model.generate(caption(one.wanted), **asked, **pictures)
        verdicts.append([satisfies(read(np.asarray(image)), one.wanted) for image in result.images])
        unpasted = np.asarray(to_pil(model.vqgan.decode(result.tokens[:1].to(model.device)))[0])
        errors.append(band_error(unpasted, one.picture, one.mask))
    right = np.array(verdicts)  # (scenes, candidates), the best candidate first
    rows = {f"best of {CANDIDATES}": right[:, 0], "a single candidate": right, "perfect ranker": right.any(axis=1)}
    each = decibels(np.array(errors))
    return {
        "scenes": scenes,
        "right": {name: shown(Share(int(row.sum()), row.size)) for name, row in rows.items()},
        "band_decibels": {
            "of the mean error": round(float(decibels(np.mean(errors))), 2),
            "mean": round(float(each.mean()), 2),
            "share of scenes with the target": round(float((each >= MIN_DECIBELS).mean()), 4),
        },
        "met": bool(right[:, 0].mean() >= MIN_SHARE and decibels(np.mean(errors)) >= MIN_DECIBELS),
    }


def decibels(error: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of squared errors of levels; at most 68, for an error of a hundredth."""
    return 10 * np.log10(255**2 / np.maximum(error, 0.01))


def shown(share: Share) -> dict[str, object]:
    return vars(share) | {"share": round(share.value, 4), "interval_95": [round(end, 4) for end in share.interval]}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "masks.json")
    arguments = parser.parse_args(words)
    model = ClipGen.load(BUNDLED, arguments.device)
    result = {"machine": machine(model.device)} | measure(model, arguments.scenes)
    text = json.dumps(result, indent=1)
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(arguments.out, text + "\n")
