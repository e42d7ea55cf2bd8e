"""What a world gives to the recipe: its datasets and captions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_gen.worlds.pairs import Collate, SeededPictures
from clip_gen.worlds.word_trainer import CaptionPair

WORLDS = ("shapes", "emoji")


@dataclass(frozen=True)
class World:
    """A world's part of the recipe. Each dataset takes a count, a seed and a resolution.

    pictures: (S, S, 3) uint8 without held-out combinations; vqgan_pictures: those that the VQGAN trains on;
    hard_pictures: more for the transformer, of scenes that it learns slowly; near_misses: for each of `pictures` one
    that differs in what belongs to which. captioned_pictures: a picture with a caption and a shorter one.
    captioned_pairs: groups for CLIP, which `collate(context_length)` joins to batches.
    choices: the number of answers to each question that the batches answer.
    """

    name: str
    choices: tuple[int, ...]
    pictures: type[SeededPictures]
    vqgan_pictures: type[SeededPictures]
    hard_pictures: type[SeededPictures]
    near_misses: type[SeededPictures]
    captioned_pictures: type[SeededPictures]
    captioned_pairs: type[SeededPictures]
    collate: Callable[[int], Collate]
    sampled_caption: Callable[[np.random.Generator], str]
    held_out: Callable[[], object]  # as JSON values
    vocabulary: Callable[[], str]  # the content of vocabulary.txt
    captions: Callable[[SeededPictures, int], tuple[str, ...]] | None = None  # of one of these pictures, by its number
    synonyms: Callable[[], Mapping[str, Mapping[str, float]]] = dict  # for fill_unseen_words
    synonym_captions: CaptionPair | None = None  # for learn_words
    licenses: Path | None = None  # names the artists and licences of the world's pictures


def load_world(name: str) -> World:
    """The world of this name; ValueError for another name."""
    if name not in WORLDS:
        raise ValueError(f'no world is called "{name}"; give {" or ".join(WORLDS)}')
    return importlib.import_module(f"clip_gen.worlds.{name}.recipe").WORLD
