"""worlds/shapes/scenes.py: what a scene can have, and where."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from clip_gen.worlds.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    MARGIN,
    MIN_GAP,
    OBJECT_SIZES,
    RELATIONS,
    SHAPES,
    Scene,
    sample_scene,
)

ROUNDING = 1e-9


def scenes(number: int, **options: object) -> list[Scene]:
    return [sample_scene(np.random.default_rng([21, i]), **options) for i in range(number)]


def test_held_out_pairs_never_occur_by_default():
    assert not any(item.held_out for scene in scenes(3000) for item in scene.items)


def test_held_out_pairs_are_the_documented_five():
    documented = "purple star, yellow heart, green cross, orange ring, cyan diamond"
    assert {tuple(pair.split()) for pair in documented.split(", ")} == HELD_OUT


def test_held_out_may_and_only_give_the_held_out_pairs():
    seen = {(item.colour, item.shape) for scene in scenes(3000, held_out="may") for item in scene.items}
    assert seen == set(product(COLOURS, SHAPES))
    only = {(item.colour, item.shape) for scene in scenes(200, held_out="only") for item in scene.items}
    assert only == HELD_OUT


def test_an_unknown_value_of_held_out_is_refused():
    with pytest.raises(ValueError, match=r'"sometimes".*"never", "may" or "only"'):
        sample_scene(np.random.default_rng(0), held_out="sometimes")


def test_scenes_have_one_or_two_items_or_the_given_count():
    assert {len(scene.items) for scene in scenes(100)} == {1, 2}
    for count in (1, 2):
        assert {len(scene.items) for scene in scenes(100, count=count)} == {count}


def test_all_names_occur():
    drawn = scenes(1000)
    items = [item for scene in drawn for item in scene.items]
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.size for item in items} == set(OBJECT_SIZES)
    assert {scene.relation for scene in drawn} == {None, *RELATIONS}


def test_items_keep_the_margin_and_the_range_of_their_size():
    for scene in scenes(1000):
        for item in scene.items:
            least, most = OBJECT_SIZES[item.size]
            assert least <= item.radius <= most
            assert min(item.x, item.y) - item.radius >= MARGIN - ROUNDING
            assert max(item.x, item.y) + item.radius <= 1 - MARGIN + ROUNDING


def test_only_two_items_have_a_relation():
    assert all((scene.relation is None) == (len(scene.items) == 1) for scene in scenes(300))


def test_items_are_clearly_in_their_relation():
    for scene in scenes(1000, count=2):
        first, second = scene.items
        right, down = second.x - first.x, second.y - first.y
        along = {"left of": right, "right of": -right, "above": down, "below": -down}[scene.relation]
        across = abs(down) if scene.relation in ("left of", "right of") else abs(right)
        assert along >= first.radius + second.radius + MIN_GAP - ROUNDING
        assert along >= 1.5 * across - ROUNDING


def test_two_items_never_look_alike():
    for scene in scenes(2000, count=2, held_out="only"):
        first, second = scene.items
        assert (first.shape, first.colour, first.size) != (second.shape, second.colour, second.size)


def test_a_scene_depends_on_the_seed():
    again = sample_scene(np.random.default_rng(5))
    assert sample_scene(np.random.default_rng(5)) == again
    assert sample_scene(np.random.default_rng(6)) != again


def test_colours_differ_clearly_from_each_other_and_from_backgrounds():
    def distance(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
        return float(np.linalg.norm(np.subtract(one, other)))

    assert all(distance(a, b) > 75 for a, b in product(COLOURS.values(), repeat=2) if a != b)
    assert all(distance(a, b) >= 100 for a, b in product(COLOURS.values(), BACKGROUNDS.values()))
