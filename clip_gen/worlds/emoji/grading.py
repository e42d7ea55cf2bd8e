"""The emoji world's part of the command `evaluate`."""

from __future__ import annotations

import numpy as np

from clip_gen.worlds.emoji.judge import Reading, grade, read
from clip_gen.worlds.emoji.judge_network import WEIGHTS, renamed
from clip_gen.worlds.emoji.prompts import TITLES, cases
from clip_gen.worlds.emoji.rendering import render
from clip_gen.worlds.judged import JudgedWorld

JUDGES = ("templates", "network") if WEIGHTS.is_file() else ("templates",)


def readings(picture: np.ndarray) -> tuple[Reading | None, ...]:
    """Of each judge."""
    reading = read(picture)
    return (reading, renamed(reading, picture)) if "network" in JUDGES else (reading,)


def is_clean(reading: Reading | None) -> bool:
    return reading is not None and reading.clean


WORLD = JudgedWorld(TITLES, cases, render, JUDGES, readings, grade, is_clean)
