"""Image prompts, negative prompts and weights on the bundled models, graded by the judges.

    python -m benchmarks steering [--only images negative weights emoji] [--pictures 500] [--out steering.json]

Half an hour on an idle core. The file keeps the verdict of every picture: the same command continues an interrupted
run, and more --pictures add to those that are judged.

images: fresh renders as image prompts; the best of 16 candidates must show every attribute of the render.
negative: prompts that leave the colour unsaid; how often the best of 4 shows red, with negative_prompt="red", without
it, and without it at the guidance that it brings.
weights: `A:w | B:1-w` for prompts A and B of other shape and colour; how many of the 4 best of 16 show A.
emoji: as images, with checkpoints/emoji and renders of one thing; the best of 16 must show that thing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.figures import RESULTS, machine
from benchmarks.masks import shown
from benchmarks.models import BUNDLED, EMOJI
from clip_gen import ClipGen
from clip_gen.files import write_text_atomic
from clip_gen.metrics.intervals import Share
from clip_gen.pipeline import NEGATIVE_GUIDANCE
from clip_gen.prompts import mixed_prompt
from clip_gen.worlds.emoji.captions import describe as describe_emoji
from clip_gen.worlds.emoji.judge import grade as grade_emoji
from clip_gen.worlds.emoji.judge import read as read_emoji
from clip_gen.worlds.emoji.rendering import render as render_emoji
from clip_gen.worlds.emoji.sampling import sample_scene as sample_emoji
from clip_gen.worlds.shapes.captions import Description, ItemDescription, caption, describe
from clip_gen.worlds.shapes.judge import MAX_COLOUR_ERROR, MIN_ITEM_PIXELS, read, satisfies
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import COLOURS, HELD_OUT, SHAPES, another, sample_scene

SEED = 340  # of the scenes and prompts
RED = np.array(COLOURS["red"], float)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of A
OUTPUTS = 4  # pictures of one draw for the weights
MIN_KEPT, MAX_RED, ENDS = {"images": 0.95, "emoji": 0.85}, 0.02, (0.10, 0.90)  # the targets

Draw = Callable[[ClipGen, int], list[bool]]  # draws the pictures of this number, and judges them


def keeps_every_attribute(model: ClipGen, number: int) -> list[bool]:
    scene = sample_scene(np.random.default_rng([SEED, 0, number]))
    picture = Image.fromarray(render(scene, model.config.vqgan.resolution))
    result = model.generate(image=picture, candidates=16, num_outputs=1, seed=number)
    return [satisfies(read(np.asarray(result.images[0])), describe(scene))]


def has_red(model: ClipGen, number: int, **settings: object) -> list[bool]:
    full = describe(sample_scene(np.random.default_rng([SEED, 1, number])))
    unsaid = replace(full, items=tuple(replace(item, colour=None) for item in full.items))
    result = model.generate(caption(unsaid), candidates=4, num_outputs=1, seed=number, **settings)
    return [shows_red(np.asarray(result.images[0]))]


def shows_red(picture: np.ndarray) -> bool:
    """Whether as many pixels (S, S, 3) as the smallest item has are as near to red as the judge asks."""
    near = np.linalg.norm(picture - RED, axis=2) <= MAX_COLOUR_ERROR
    return int(near.sum()) >= MIN_ITEM_PIXELS


def shows_first(model: ClipGen, number: int, weight: float) -> list[bool]:
    first, second = two_prompts(number)
    prompt = mixed_prompt(caption(second), caption(first), weight)
    result = model.generate(prompt, candidates=16, num_outputs=OUTPUTS, seed=number)
    return [satisfies(read(np.asarray(image)), first) for image in result.images]


def two_prompts(number: int) -> tuple[Description, Description]:
    """An object on a background, and another of other shape and colour on the same one; none is held out."""
    rng = np.random.default_rng([SEED, 2, number])
    first = describe(sample_scene(rng, count=1))
    item = first.items[0]
    while True:
        other = ItemDescription(another(rng, SHAPES, item.shape), another(rng, COLOURS, item.colour), item.size)
        if (other.colour, other.shape) not in HELD_OUT:
            return first, replace(first, items=(other,))


def keeps_the_thing(model: ClipGen, number: int) -> list[bool]:
    rng = np.random.default_rng([SEED, 3, number])
    while len((scene := sample_emoji(rng)).items) > 1:
        pass
    picture = Image.fromarray(render_emoji(scene, model.config.vqgan.resolution))
    result = model.generate(image=picture, candidates=16, num_outputs=1, seed=number)
    return [grade_emoji(read_emoji(np.asarray(result.images[0])), describe_emoji(scene))["name"]]


PARTS: dict[str, dict[str, Draw]] = {
    "images": {"every attribute": keeps_every_attribute},
    "negative": {
        'negative_prompt "red"': partial(has_red, negative_prompt="red"),
        "without it": has_red,
        f"without it, guidance {NEGATIVE_GUIDANCE:g}": partial(has_red, guidance=NEGATIVE_GUIDANCE),
    },
    "weights": {f"A's weight is {weight:g}": partial(shows_first, weight=weight) for weight in WEIGHTS},
    "emoji": {"the thing": keeps_the_thing},
}


def is_met(part: str, shares: Sequence[Share]) -> bool:
    """Whether the shares of a part's rows reach its target."""
    first, last = shares[0].value, shares[-1].value
    if part in MIN_KEPT:
        return first >= MIN_KEPT[part]
    if part == "negative":
        return first <= MAX_RED
    falls = any(later.value < share.interval[0] for share, later in pairwise(shares))
    return first < ENDS[0] and last > ENDS[1] and not falls


def figures(part: str, verdicts: dict[str, str]) -> dict[str, object]:
    """The shares of each row and whether the part's target is met. verdicts: ones and zeros, a word for each draw."""
    shares = {row: Share(found.count("1"), found.count("1") + found.count("0")) for row, found in verdicts.items()}
    rows = {row: shown(share) for row, share in shares.items()}
    return {"rows": rows, "met": is_met(part, list(shares.values())), "verdicts": verdicts}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks steering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pictures", type=int, default=500, help="judged for each figure; default 500")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "steering.json", help="a JSON file")
    arguments = parser.parse_args(words)
    if arguments.pictures < 1:
        parser.error(f"--pictures is {arguments.pictures}; give 1 or more")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for part in arguments.only:
        model = ClipGen.load(EMOJI if part == "emoji" else BUNDLED, arguments.device)
        facts = {"machine": machine(model.device), "model": model.sha256}
        before = results.get(part, {})
        kept = before["verdicts"] if before.get("model") == model.sha256 else {}
        verdicts = {row: kept.get(row, "") for row in PARTS[part]}
        for row, draw in PARTS[part].items():
            while len((drawn := verdicts[row]).replace(" ", "")) < arguments.pictures:
                found = draw(model, len(drawn.split()))
                verdicts[row] = f"{drawn} {''.join(str(int(right)) for right in found)}".lstrip()
                results[part] = facts | {"verdicts": verdicts}
                write_text_atomic(arguments.out, json.dumps(results, indent=1) + "\n")
        results[part] = facts | figures(part, verdicts)
        print(json.dumps({part: results[part]}, indent=1), flush=True)
        write_text_atomic(arguments.out, json.dumps(results, indent=1) + "\n")
