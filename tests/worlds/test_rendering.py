"""worlds/shapes/rendering.py: shapes have the size, the place and the colour of the scene."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from clip_gen.worlds.shapes.rendering import coverage, render
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Item, Scene, sample_scene

# Of each shape with radius 1. The heart's is its sextic's area, 3.6612, over both scales.
AREAS = {
    "circle": np.pi,
    "square": 1.76**2,
    "triangle": 1.8,
    "star": 5 * 0.45 * np.sin(np.pi / 5),
    "heart": 3.6612 / (1.14 * 1.12),
    "cross": 2 * 2 * 0.64 - 0.64**2,
    "ring": np.pi * (1 - 0.55**2),
    "diamond": 2 * 0.8,
}
# Half the width and half the height that a shape of radius 1 fills, in its box of half side 1.
REACH = {
    "circle": (1, 1),
    "square": (0.88, 0.88),
    "triangle": (1, 0.95),
    "star": (np.sin(np.pi * 0.4), 1),
    "heart": (1, 1),
    "cross": (1, 1),
    "ring": (1, 1),
    "diamond": (0.8, 1),
}


@pytest.mark.parametrize("resolution", [64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_analytic_area(shape, resolution):
    covered = float(coverage(shape, 0.47, 0.52, 0.2, resolution).sum()) / (0.2 * resolution) ** 2
    assert covered == pytest.approx(AREAS[shape], rel=0.01 if resolution == 256 else 0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_bounding_square_and_stays_inside(shape):
    rows, columns = np.nonzero(coverage(shape, 0.5, 0.5, 0.4, 400) > 0.5)
    half_width = max(200 - columns.min(), columns.max() + 1 - 200) / 160
    half_height = max(200 - rows.min(), rows.max() + 1 - 200) / 160
    assert (half_width, half_height) == pytest.approx(REACH[shape], abs=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_symmetric(shape):
    mask = coverage(shape, 0.5, 0.5, 0.3, 64)
    assert np.array_equal(mask, mask[:, ::-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_only_triangle_star_and_heart_look_different_upside_down(shape):
    mask = coverage(shape, 0.5, 0.5, 0.3, 64)
    assert np.array_equal(mask, mask[::-1]) == (shape not in ("triangle", "star", "heart"))


@pytest.mark.parametrize("shape", ["circle", "ring", "square", "cross"])
def test_round_and_square_shapes_are_the_same_after_a_quarter_turn(shape):
    mask = coverage(shape, 0.5, 0.5, 0.3, 64)
    assert np.array_equal(mask, np.rot90(mask))


def test_triangle_and_star_point_up_and_a_heart_down():
    for shape in ("triangle", "star"):
        width = (coverage(shape, 0.5, 0.5, 0.3, 200) > 0.5).sum(axis=1)
        assert width[width > 0][0] < 10, shape
    width = (coverage("heart", 0.5, 0.5, 0.3, 200) > 0.5).sum(axis=1)
    assert width[width > 0][-1] < 10


def test_only_edges_are_soft():
    mask = coverage("circle", 0.5, 0.5, 0.3, 64)
    soft = (mask > 0) & (mask < 1)
    rows, columns = np.nonzero(soft)
    distance = np.hypot(rows + 0.5 - 32, columns + 0.5 - 32)
    assert soft.sum() > 60
    assert abs(distance - 0.3 * 64).max() < 1


def test_a_shape_across_the_edge_is_cut_and_one_outside_is_not_drawn():
    whole, cut = coverage("circle", 0.5, 0.5, 0.2, 64), coverage("circle", 0, 0.5, 0.2, 64)
    assert cut.sum() == pytest.approx(whole.sum() / 2, rel=0.01)
    assert not coverage("circle", -0.5, 0.5, 0.2, 64).any()


@pytest.mark.parametrize("seed", range(8))
def test_a_scene_looks_the_same_at_other_resolutions(seed):
    scene = sample_scene(np.random.default_rng(seed))
    shrunk = Image.fromarray(render(scene, 256)).resize((64, 64), Image.Resampling.BOX)
    difference = abs(np.int16(np.asarray(shrunk)) - render(scene, 64)).max(axis=-1)
    assert difference.mean() < 1
    assert difference.max() < 64


def test_pixels_have_the_colours_of_the_scene():
    items = (Item("circle", "red", "large", 0.25, 0.3, 0.2), Item("ring", "cyan", "large", 0.7, 0.7, 0.2))
    picture = render(Scene("brown", items, "above"), 100)
    assert picture.shape == (100, 100, 3)
    assert picture.dtype == np.uint8
    at = {"corner": (0, 0), "circle": (30, 25), "hole": (70, 70), "rim": (70, 70 + 16)}
    assert tuple(picture[at["corner"]]) == BACKGROUNDS["brown"]
    assert tuple(picture[at["circle"]]) == COLOURS["red"]
    assert tuple(picture[at["hole"]]) == BACKGROUNDS["brown"]
    assert tuple(picture[at["rim"]]) == COLOURS["cyan"]


def test_rendering_is_deterministic():
    scene = sample_scene(np.random.default_rng(3))
    assert np.array_equal(render(scene), render(scene))
