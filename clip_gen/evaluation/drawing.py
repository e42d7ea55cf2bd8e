"""Draws the pictures of an evaluation into files, so that a killed run resumes and processes can share the work."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from clip_gen.generate import DEFAULTS, read_lines
from clip_gen.pipeline import ClipGen
from clip_gen.progress_bar import CountLog
from clip_gen.prompts_file import Line, draw_lines, undrawn_lines

FIXED = {"num_outputs": 1, "output_format": "png", "output_grid": False, "output_size": "1x"}
WAIT_SECONDS = 10.0  # between two looks for what other processes have drawn


def prompt_lines(path: Path, settings: Mapping[str, object]) -> list[Line]:
    """A line for each prompt of a file as `generate` reads it. settings: candidates, seed and sampling; the nth prompt
    has the seed plus n. ValueError for a line that cannot be used.
    """
    found = read_lines(path, DEFAULTS | dict(settings) | {"seed": None}, FIXED)
    for line in found:
        if not line.settings["prompt"]:
            raise ValueError(f"{path} line {line.number}: has no prompt; give one")
    if len(found) < 2:
        raise ValueError(f"{path}: holds one prompt; give at least 2")
    return [_with_seed(line, settings["seed"] + i) for i, line in enumerate(found)]


def picture_lines(paths: Sequence[Path], numbers: Sequence[int], settings: Mapping[str, object]) -> list[Line]:
    """A line for each of the pictures with these numbers: what the model draws from its embedding. Picture number n has
    the seed plus n.
    """
    values = DEFAULTS | dict(settings) | FIXED | {"prompt": ""}
    return [Line(n + 1, values | {"image": paths[n], "seed": settings["seed"] + n}) for n in numbers]


def _with_seed(line: Line, seed: int) -> Line:
    given = line.settings["seed"]
    return Line(line.number, line.settings | {"seed": seed if given is None else given})


def draw(model: ClipGen, lines: Sequence[Line], folder: Path, what: str, share: tuple[int, int]) -> list[Path]:
    """Draws this process's share of the lines; the first process waits for all of them. The files in their order."""
    process, processes = share
    own = lines[process::processes]
    waiting = undrawn_lines(model, own, folder)
    progress = CountLog(what, len(own), before=len(own) - len(waiting))
    with _without_warnings():
        draw_lines(model, waiting, folder, overwrite=True, has_bar=process == 0, say=lambda _: progress.advance(1))
    while process == 0 and processes > 1 and undrawn_lines(model, lines, folder):
        time.sleep(WAIT_SECONDS)
    return [folder / line.names("")[0] for line in lines]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The pipeline would warn of unknown words for each of many prompts."""
    pipeline = logging.getLogger("clip_gen.pipeline")
    before = pipeline.level
    pipeline.setLevel(logging.ERROR)
    try:
        yield
    finally:
        pipeline.setLevel(before)
