"""The command `train-shapes`."""

from __future__ import annotations

import argparse
from functools import partial

from clip_gen.worlds import recipe
from clip_gen.worlds.pairs import Collate
from clip_gen.worlds.shapes import pairs
from clip_gen.worlds.shapes.scenes import HELD_OUT
from clip_gen.worlds.shapes.vocabulary import vocabulary
from clip_gen.worlds.world import World

WORLD = World(
    name="shapes",
    choices=pairs.CHOICES,
    pictures=pairs.RenderedPictures,
    vqgan_pictures=pairs.HardPictures,
    hard_pictures=pairs.HardPictures,
    near_misses=pairs.NearMisses,
    captioned_pictures=pairs.CaptionedPictures,
    captioned_pairs=pairs.CaptionedPairs,
    collate=partial(Collate, fits=pairs.fits, stated_answers=pairs.answers, shown_answers=pairs.answers),
    sampled_caption=pairs.sampled_caption,
    held_out=lambda: sorted(" ".join(pair) for pair in HELD_OUT),
    vocabulary=vocabulary,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe.add_arguments(parser, WORLD.name)


main = recipe.main
