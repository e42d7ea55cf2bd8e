"""The shapes world's part of the command `evaluate`."""

from __future__ import annotations

import numpy as np

from clip_gen.worlds.judged import JudgedWorld
from clip_gen.worlds.shapes.judge import Reading, grade, read
from clip_gen.worlds.shapes.prompts import TITLES, cases
from clip_gen.worlds.shapes.rendering import render


def read_alone(picture: np.ndarray) -> tuple[Reading | None]:
    return (read(picture),)


def is_clean(reading: Reading | None) -> bool:
    return reading is not None


WORLD = JudgedWorld(TITLES, cases, render, ("judge",), read_alone, grade, is_clean)
