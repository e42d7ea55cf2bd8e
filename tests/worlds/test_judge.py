"""worlds/shapes/judge.py: reads renders, also slightly blurred and noisy ones, and refuses unclear pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from clip_gen.worlds.shapes.captions import Description, ItemDescription, describe, leave_unsaid, swapped
from clip_gen.worlds.shapes.judge import grade, read, satisfies
from clip_gen.worlds.shapes.rendering import coverage, render
from clip_gen.worlds.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECT_SIZES,
    OPPOSITE,
    SHAPES,
    Item,
    Scene,
    sample_scene,
)

RING = Item("ring", "green", "large", 0.3, 0.4, 0.21)
HEART = Item("heart", "blue", "small", 0.75, 0.55, 0.13)
PAIR = Scene("white", (RING, HEART), "left of")


def random_scenes(number: int, **options: object) -> list[Scene]:
    return [sample_scene(np.random.default_rng([41, i]), held_out="may", **options) for i in range(number)]


def share_right(scenes: list[Scene], pictures: Iterable[np.ndarray]) -> float:
    verdicts = [satisfies(read(picture), describe(scene)) for scene, picture in zip(scenes, pictures, strict=True)]
    return float(np.mean(verdicts))


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    reach = np.arange(-int(4 * sigma + 1), int(4 * sigma + 1) + 1)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    side = len(picture)
    for axis in (0, 1):
        width = [(len(reach) // 2,) * 2 if axis == padded else (0, 0) for padded in range(3)]
        padded = np.pad(np.float64(picture), width, mode="edge")
        parts = [part * np.take(padded, range(i, i + side), axis) for i, part in enumerate(kernel)]
        picture = np.sum(parts, axis=0)
    return picture


def as_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def drawn(mask: np.ndarray, colour: str = "blue", background: str = "white") -> np.ndarray:
    backdrop = np.float32(BACKGROUNDS[background])
    return as_bytes(backdrop + mask[..., None] * (np.float32(COLOURS[colour]) - backdrop))


def alone(item: Item, background: str = "white") -> Scene:
    return Scene(background, (item,))


@pytest.mark.parametrize(("start", "end"), [(0, 500), pytest.param(500, 2000, marks=pytest.mark.slow)])
def test_renders_are_read_correctly(start: int, end: int):
    scenes = random_scenes(end)[start:]
    assert share_right(scenes, (render(scene) for scene in scenes)) >= 0.999


@pytest.mark.parametrize("resolution", [48, 100, 128, 256])
def test_renders_of_other_resolutions_are_read_correctly(resolution):
    scenes = random_scenes(100)
    assert share_right(scenes, [render(scene, resolution) for scene in scenes]) == 1


def test_every_shape_colour_size_and_background_is_read_correctly():
    for shape, colour in product(SHAPES, COLOURS):
        for background, size in zip(BACKGROUNDS, (*OBJECT_SIZES, *OBJECT_SIZES), strict=True):
            scene = alone(Item(shape, colour, size, 0.52, 0.47, np.mean(OBJECT_SIZES[size])), background)
            assert satisfies(read(render(scene)), describe(scene)), scene


def test_readings_have_the_places_of_the_items():
    for scene in random_scenes(100):
        for item in read(render(scene)).items:
            near = min(scene.items, key=lambda other: abs(other.x - item.x) + abs(other.y - item.y))
            assert (item.x, item.y) == pytest.approx((near.x, near.y), abs=0.3 / 64)
            assert item.radius == pytest.approx(near.radius, rel=0.03)


def test_two_items_are_ordered_from_left_to_right_or_top_to_bottom():
    for scene in random_scenes(100, count=2):
        reading = read(render(scene))
        first, second = reading.items
        assert reading.relation in ("left of", "above")
        assert first.x < second.x if reading.relation == "left of" else first.y < second.y


def test_a_reading_does_not_depend_on_the_order_of_rendering():
    for scene in random_scenes(30, count=2):
        assert read(render(scene)) == read(render(replace(scene, items=scene.items[::-1])))


def test_slight_blur_and_noise_do_not_matter():
    scenes, rng = random_scenes(300), np.random.default_rng(1)
    pictures = [as_bytes(blurred(render(scene), 0.5) + rng.normal(0, 6, (64, 64, 3))) for scene in scenes]
    assert share_right(scenes, pictures) >= 0.98


def test_a_slight_tint_does_not_matter():
    scenes, rng = random_scenes(100), np.random.default_rng(2)
    pictures = [as_bytes(render(scene) + rng.uniform(-12, 12, 3)) for scene in scenes]
    assert share_right(scenes, pictures) >= 0.98


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_read(seed):
    assert read(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)) is None


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_background_is_not_read(background):
    assert read(render(Scene(background, ()))) is None


def test_a_background_of_an_unknown_colour_is_not_read():
    picture = render(alone(RING))
    picture[(picture == BACKGROUNDS["white"]).all(axis=-1)] = (150, 200, 250)
    assert read(picture) is None


@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_a_strong_blur_is_not_read(sigma):
    assert all(read(as_bytes(blurred(render(scene), sigma))) is None for scene in random_scenes(30))


@pytest.mark.parametrize("axis", [0, 1])
def test_motion_blur_is_not_read(axis):
    for scene in random_scenes(30, count=1):
        shifted = [np.roll(np.float64(render(scene)), step, axis) for step in range(-4, 5)]
        assert read(as_bytes(np.mean(shifted, axis=0))) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_half_an_item_is_not_read_as_that_item(shape):
    for size, colour in zip(OBJECT_SIZES, ("red", "blue"), strict=True):
        scene = alone(Item(shape, colour, size, 0.5, 0.5, np.mean(OBJECT_SIZES[size])))
        for half in (np.s_[:32], np.s_[32:], np.s_[:, :32], np.s_[:, 32:]):
            picture = render(scene)
            picture[half] = BACKGROUNDS["white"]
            assert not satisfies(read(picture), describe(scene))


@pytest.mark.parametrize(("one", "other"), list(combinations(SHAPES, 2)))
def test_a_mean_of_two_shapes_is_neither(one, other):
    for size, colour, background in (("small", "red", "brown"), ("large", "blue", "white")):
        radius = np.mean(OBJECT_SIZES[size])
        mask = (coverage(one, 0.5, 0.5, radius, 64) + coverage(other, 0.5, 0.5, radius, 64)) / 2
        reading = read(drawn(mask, colour, background))
        for shape in (one, other):
            assert not satisfies(reading, Description((ItemDescription(shape),)))


def test_a_square_with_round_corners_is_neither_square_nor_circle():
    at = (np.arange(640) + 0.5) / 10 - 32
    inside = (abs(at) ** 3.5)[None] + (abs(at) ** 3.5)[:, None] <= 13**3.5
    assert read(drawn(inside.reshape(64, 10, 64, 10).mean(axis=(1, 3)))) is None


def test_three_items_are_not_read():
    third = Item("star", "red", "small", 0.7, 0.2, 0.13)
    assert read(render(PAIR)) is not None
    assert read(render(replace(PAIR, items=(RING, HEART, third)))) is None


@pytest.mark.parametrize("x", [0.0, 0.1, 0.18])
def test_an_item_cut_by_the_edge_is_not_read(x):
    assert read(render(alone(Item("square", "red", "large", x, 0.5, 0.21)))) is None


def test_debris_on_the_background_is_not_read():
    for side, colour in product((2, 3, 5), ("red", "purple")):
        picture = render(PAIR)
        picture[5 : 5 + side, 50 : 50 + side] = COLOURS[colour]
        assert read(picture) is None


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])
def test_a_hole_in_a_shape_is_not_read(shape, background):
    picture = render(alone(Item(shape, "cyan", "large", 0.5, 0.5, 0.21), background))
    picture[31:33, 31:33] = BACKGROUNDS[background]
    assert read(picture) is None


def test_an_item_of_two_colours_is_not_read():
    for one, other in combinations(COLOURS, 2):
        picture = render(alone(Item("circle", one, "large", radius=0.21)))
        picture[:, 32:] = render(alone(Item("circle", other, "large", radius=0.21)))[:, 32:]
        assert read(picture) is None, (one, other)


def test_a_colour_halfway_to_the_background_is_not_read():
    for colour, background in product(COLOURS, BACKGROUNDS):
        picture = drawn(coverage("circle", 0.5, 0.5, 0.21, 64) / 2, colour, background)
        assert not satisfies(read(picture), Description((ItemDescription(colour=colour),)))


def test_a_mean_of_orange_and_yellow_is_not_read():
    both = [np.float64(render(alone(Item("heart", colour, "large")))) for colour in ("orange", "yellow")]
    assert read(as_bytes((both[0] + both[1]) / 2)) is None


@pytest.mark.parametrize("radius", [0.07, 0.09, 0.27, 0.35])
def test_an_item_that_is_neither_small_nor_large_is_not_read(radius):
    assert read(render(alone(Item("circle", "red", "large", 0.5, 0.5, radius)))) is None


def test_two_items_that_touch_are_not_read():
    touching = (Item("square", "red", "large", 0.3, 0.5, 0.2), Item("square", "red", "large", 0.65, 0.5, 0.2))
    assert read(render(Scene("white", touching, "left of"))) is None


def test_unsaid_attributes_do_not_matter():
    rng = np.random.default_rng(3)
    for scene in random_scenes(50):
        reading = read(render(scene))
        assert all(satisfies(reading, leave_unsaid(describe(scene), rng, chance)) for chance in (0.3, 0.7, 1))


def test_the_order_of_items_in_a_description_does_not_matter():
    for scene in random_scenes(30, count=2):
        assert satisfies(read(render(scene)), swapped(describe(scene)))


def test_a_wrong_relation_is_graded_wrong():
    turned = replace(describe(PAIR), relation=OPPOSITE[PAIR.relation])
    assert not satisfies(read(render(PAIR)), turned)
    assert grade(read(render(PAIR)), turned) == {
        "count": True,
        "background": True,
        "shape": True,
        "colour": True,
        "size": True,
        "relation": False,
    }


@pytest.mark.parametrize(
    ("attribute", "wrong"),
    [
        ("background", replace(describe(PAIR), background="black")),
        ("relation", replace(describe(PAIR), relation="above")),
        *(
            (name, replace(describe(PAIR), items=(replace(describe(PAIR).items[0], **{name: value}), HEART)))
            for name, value in (("shape", "circle"), ("colour", "cyan"), ("size", "small"))
        ),
    ],
)
def test_only_the_wrong_attribute_is_graded_wrong(attribute, wrong):
    grades = grade(read(render(PAIR)), wrong)
    assert [name for name, right in grades.items() if not right] == [attribute]
    assert not satisfies(read(render(PAIR)), wrong)


def test_attributes_of_the_other_item_are_wrong():
    exchanged = replace(
        describe(PAIR), items=(replace(describe(PAIR).items[0], colour="blue"), ItemDescription("heart", "green"))
    )
    assert not satisfies(read(render(PAIR)), exchanged)
    assert not satisfies(
        read(render(PAIR)), Description((ItemDescription(colour="green"), ItemDescription(colour="green")))
    )


def test_the_count_is_always_graded():
    one, two = read(render(alone(RING))), read(render(PAIR))
    ring, rings = Description((ItemDescription("ring"),)), Description((ItemDescription("ring"),) * 2)
    assert satisfies(one, ring)
    assert grade(two, ring) == {"count": False, "shape": True}
    assert grade(one, rings) == {"count": False, "shape": False}
    assert not satisfies(two, ring)


def test_only_stated_attributes_are_graded():
    assert grade(read(render(alone(RING))), Description((ItemDescription(size="large"),))) == {
        "count": True,
        "size": True,
    }


def test_without_a_reading_everything_stated_is_wrong():
    assert grade(None, describe(PAIR)) == dict.fromkeys(
        ("count", "background", "relation", "shape", "colour", "size"), False
    )
    assert not satisfies(None, Description((ItemDescription(),)))
