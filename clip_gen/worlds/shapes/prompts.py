"""Fixed prompts to evaluate a shapes model. Prompt i of a kind depends only on the seed, the kind and i."""

from __future__ import annotations

import numpy as np

from clip_gen.worlds.judged import Case
from clip_gen.worlds.shapes.captions import caption, describe, leave_unsaid
from clip_gen.worlds.shapes.scenes import sample_scene

TITLES = {
    "one": "one object",
    "two": "two objects with a relation",
    "held_out": "one object of a held-out pair",
    "unsaid": "attributes left unsaid",
}
KINDS = tuple(TITLES)


def cases(kind: str, count: int, seed: int) -> list[Case]:
    """kind: one object, two with a relation, one of a held-out pair, or one or two with attributes left unsaid."""
    return [_case(kind, np.random.default_rng([seed, KINDS.index(kind), i])) for i in range(count)]


def _case(kind: str, rng: np.random.Generator) -> Case:
    count = {"one": 1, "two": 2, "held_out": 1}.get(kind)
    scene = sample_scene(rng, count=count, held_out="only" if kind == "held_out" else "never")
    description = full = describe(scene)
    while kind == "unsaid" and description == full:
        description = leave_unsaid(full, rng, chance=0.5)
    return Case(caption(description), description, scene)
