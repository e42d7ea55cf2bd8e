"""Image prompts, negative prompts and weights on the bundled model, graded by the judge.

    python -m benchmarks steering [--only images negative weights] [--pictures 500] [--out steering.json]

images: fresh renders as image prompts; the best of 16 candidates must show every attribute of the render.
negative: prompts that leave the colour unsaid; how often the best of 4 shows red, with negative_prompt="red", without
it, and without it at the guidance that it brings.
weights: `A:w | B:1-w` for prompts A and B of other shape and colour; how many of the 4 best of 16 show A.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.figures import RESULTS, machine
from benchmarks.masks import shown
from benchmarks.models import BUNDLED
from clip_gen import ClipGen
from clip_gen.files import write_text_atomic
from clip_gen.metrics.intervals import Share
from clip_gen.pipeline import NEGATIVE_GUIDANCE
from clip_gen.prompts import mixed_prompt
from clip_gen.worlds.shapes.captions import Description, ItemDescription, caption, describe
from clip_gen.worlds.shapes.judge import MAX_COLOUR_ERROR, MIN_ITEM_PIXELS, read, satisfies
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import COLOURS, HELD_OUT, SHAPES, another, sample_scene

SEED = 340  # of the scenes and prompts
RED = np.array(COLOURS["red"], float)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of A
OUTPUTS = 4  # pictures of one draw for the weights
MIN_KEPT, MAX_RED, ENDS = 0.95, 0.02, (0.10, 0.90)  # the targets


def images(model: ClipGen, pictures: int) -> dict[str, object]:
    right = 0
    for number in range(pictures):
        scene = sample_scene(np.random.default_rng([SEED, 0, number]))
        picture = render(scene, model.config.vqgan.resolution)
        result = model.generate(image=Image.fromarray(picture), candidates=16, num_outputs=1, seed=number)
        right += satisfies(read(np.asarray(result.images[0])), describe(scene))
    kept = Share(right, pictures)
    return {"every attribute": shown(kept), "met": kept.value >= MIN_KEPT}


def negative(model: ClipGen, pictures: int) -> dict[str, object]:
    ways = {
        'negative_prompt "red"': {"negative_prompt": "red"},
        "without it": {},
        f"without it, guidance {NEGATIVE_GUIDANCE:g}": {"guidance": NEGATIVE_GUIDANCE},
    }
    shares = {way: Share(red_pictures(model, pictures, settings), pictures) for way, settings in ways.items()}
    return {
        "red": {way: shown(share) for way, share in shares.items()},
        "met": next(iter(shares.values())).value <= MAX_RED,
    }


def red_pictures(model: ClipGen, pictures: int, settings: dict[str, object]) -> int:
    count = 0
    for number in range(pictures):
        full = describe(sample_scene(np.random.default_rng([SEED, 1, number])))
        unsaid = replace(full, items=tuple(replace(item, colour=None) for item in full.items))
        result = model.generate(caption(unsaid), candidates=4, num_outputs=1, seed=number, **settings)
        count += shows_red(np.asarray(result.images[0]))
    return count


def shows_red(picture: np.ndarray) -> bool:
    """Whether as many pixels (S, S, 3) as the smallest item has are as near to red as the judge asks."""
    near = np.linalg.norm(picture - RED, axis=2) <= MAX_COLOUR_ERROR
    return int(near.sum()) >= MIN_ITEM_PIXELS


def weights(model: ClipGen, pictures: int) -> dict[str, object]:
    shares = []
    for weight in WEIGHTS:
        verdicts = [
            satisfies(read(np.asarray(image)), first)
            for number in range(pictures // OUTPUTS)
            for first, second in [two_prompts(number)]
            for image in model.generate(
                mixed_prompt(caption(second), caption(first), weight), candidates=16, num_outputs=OUTPUTS, seed=number
            ).images
        ]
        shares.append(Share(sum(verdicts), len(verdicts)))
    falls = any(later.value < share.interval[0] for share, later in pairwise(shares))
    ends = shares[0].value < ENDS[0] and shares[-1].value > ENDS[1]
    rows = {f"{weight:g}": shown(share) for weight, share in zip(WEIGHTS, shares, strict=True)}
    return {"A by its weight": rows, "met": ends and not falls}


def two_prompts(number: int) -> tuple[Description, Description]:
    """An object on a background, and another of other shape and colour on the same one; none is held out."""
    rng = np.random.default_rng([SEED, 2, number])
    first = describe(sample_scene(rng, count=1))
    item = first.items[0]
    while True:
        other = ItemDescription(another(rng, SHAPES, item.shape), another(rng, COLOURS, item.colour), item.size)
        if (other.colour, other.shape) not in HELD_OUT:
            return first, replace(first, items=(other,))


PARTS: dict[str, Callable[[ClipGen, int], dict[str, object]]] = {
    "images": images,
    "negative": negative,
    "weights": weights,
}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks steering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pictures", type=int, default=500, help="graded for each figure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "steering.json")
    arguments = parser.parse_args(words)
    model = ClipGen.load(BUNDLED, arguments.device)
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for part in arguments.only:
        figures = PARTS[part](model, arguments.pictures)
        results[part] = {"machine": machine(model.device), "pictures": arguments.pictures} | figures
        print(json.dumps({part: results[part]}, indent=1), flush=True)
        write_text_atomic(arguments.out, json.dumps(results, indent=1) + "\n")
