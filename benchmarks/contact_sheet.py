"""The contact sheet of the README: the best pictures of a few prompts by the default model, not selected by hand.

.venv/bin/python -m benchmarks contact-sheet --out docs/sheet.webp
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clip_gen.files import ROOT
from clip_gen.pipeline import ClipGen
from clip_gen.weights.default_model import BUNDLED

PROMPTS = (
    "a cat",
    "a slice of pizza",
    "a red umbrella",
    "a dog on a blue background",
    "a rocket on a black background",
    "a flower on a yellow background",
    "three apples on a green background",
    "a house left of a tree",
    "a red apple and a green pear",
    "a cat on a horse",
)
COLUMNS, BEST, SCALE, GAP, TEXT = 2, 4, 1, 6, 22


def contact_sheet(model: ClipGen, prompts: tuple[str, ...] = PROMPTS, seed: int = 0) -> Image.Image:
    """The best four of sixteen for each prompt, beneath its words."""
    side = model.config.vqgan.resolution * SCALE
    width, height = BEST * (side + GAP) + 2 * GAP, side + TEXT + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * width + GAP, -(-len(prompts) // COLUMNS) * height + GAP), (250, 250, 250))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for i, prompt in enumerate(prompts):
        left, top = i % COLUMNS * width + 2 * GAP, i // COLUMNS * height + GAP
        draw.text((left, top), prompt, fill=(30, 30, 30), font=font)
        images = model.generate(prompt, candidates=16, num_outputs=BEST, seed=seed).images
        for j, image in enumerate(images):
            spot = (left + j * (side + GAP), top + TEXT)
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), spot)
            draw.rectangle((*spot, spot[0] + side - 1, spot[1] + side - 1), outline=(200, 200, 200))
    return sheet


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks contact-sheet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "sheet.webp")
    arguments = parser.parse_args(words)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(ClipGen.load(arguments.model))
    sheet.save(arguments.out, quality=90)
