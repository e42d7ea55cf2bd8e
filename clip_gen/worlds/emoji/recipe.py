"""The command `train-emoji`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from clip_gen.worlds import recipe
from clip_gen.worlds.emoji import pairs
from clip_gen.worlds.emoji.scenes import held_out
from clip_gen.worlds.emoji.synonyms import synonyms
from clip_gen.worlds.emoji.vocabulary import vocabulary
from clip_gen.worlds.pairs import Collate
from clip_gen.worlds.world import World

WORLD = World(
    name="emoji",
    choices=pairs.CHOICES,
    pictures=pairs.RenderedPictures,
    vqgan_pictures=pairs.RenderedPictures,
    hard_pictures=pairs.HardPictures,
    near_misses=pairs.NearMisses,
    captioned_pictures=pairs.CaptionedPictures,
    captioned_pairs=pairs.CaptionedPairs,
    collate=partial(Collate, fits=pairs.fits, stated_answers=pairs.answers, shown_answers=pairs.shown_answers),
    sampled_caption=pairs.sampled_caption,
    captions=pairs.captions,
    held_out=lambda: {kind: sorted(map(list, rows)) for kind, rows in held_out().items()},
    vocabulary=vocabulary,
    synonyms=synonyms,
    synonym_captions=pairs.synonym_captions,
    licenses=Path(__file__).parent / "LICENSES.md",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe.add_arguments(parser, WORLD.name)


main = recipe.main
