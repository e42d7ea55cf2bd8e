"""The emoji world's part of the command `evaluate`."""

from __future__ import annotations

import numpy as np

from clip_gen.worlds.emoji.judge import Reading, grade, read
from clip_gen.worlds.emoji.prompts import TITLES, cases
from clip_gen.worlds.emoji.rendering import render
from clip_gen.worlds.judged import JudgedWorld


def read_alone(picture: np.ndarray) -> tuple[Reading | None]:
    return (read(picture),)


def is_clean(reading: Reading | None) -> bool:
    return reading is not None and reading.clean


WORLD = JudgedWorld(TITLES, cases, render, ("templates",), read_alone, grade, is_clean)
