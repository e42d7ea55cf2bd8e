"""What a world gives to the evaluation: prompts with what they say, renders and judges."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """A prompt, what it says, and a scene that fits it; the last two in the world's own classes."""

    prompt: str
    description: object
    scene: object


@dataclass(frozen=True)
class JudgedWorld:
    """A world's part of the evaluation. A reading is what a judge sees in a picture; None: nothing it knows.

    titles: of the kinds of prompts. cases: of a kind, a number of prompts and a seed. render: a scene at a resolution,
    (S, S, 3) uint8. judges: their names, the most trusted first. read: a picture's reading by each judge. grade: right
    or wrong for each attribute that a description states. is_clean: whether a judge could read all of the picture.
    """

    titles: dict[str, str]
    cases: Callable[[str, int, int], list[Case]]
    render: Callable[[object, int], np.ndarray]
    judges: tuple[str, ...]
    read: Callable[[np.ndarray], tuple[object | None, ...]]
    grade: Callable[[object | None, object], dict[str, bool]]
    is_clean: Callable[[object | None], bool]


def load_judged_world(name: str) -> JudgedWorld:
    """The world of this name, one of WORLDS in world.py."""
    return importlib.import_module(f"clip_gen.worlds.{name}.grading").WORLD
