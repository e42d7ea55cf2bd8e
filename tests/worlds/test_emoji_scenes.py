"""worlds/emoji/scenes.py, sampling.py and rendering.py: scenes at random, held-out combinations, and their pixels."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import product

import numpy as np
import pytest
from PIL import Image

from clip_gen.worlds.emoji.drawings import COLOURS, STYLES, dominant_hue
from clip_gen.worlds.emoji.rendering import boxes, is_visible, render, sprite
from clip_gen.worlds.emoji.sampling import RECOLOURED, SHARES, another, is_clear, sample_scene
from clip_gen.worlds.emoji.scenes import (
    BACKGROUNDS,
    CORNERS,
    COUNTS,
    GRID,
    LAYOUTS,
    OPPOSITE,
    RELATIONS,
    SIZES,
    Item,
    Scene,
    held_out,
    held_out_by,
)
from clip_gen.worlds.emoji.words import things

CAT, DOG = Item("cat", "noto"), Item("dog", "noto")


@cache
def sampled(count: int = 300) -> list[Scene]:
    return [sample_scene(np.random.default_rng([5, i])) for i in range(count)]


def scene(layout: str, *items: Item, background: str = "white") -> Scene:
    return Scene(background, layout, items or (CAT,) * len(LAYOUTS[layout]))


def test_a_scene_depends_on_the_seed() -> None:
    assert sample_scene(np.random.default_rng([5, 7])) == sampled()[7]
    assert len(set(sampled())) > 295


def test_scenes_have_all_layouts_backgrounds_and_styles_at_their_shares() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    assert {*SHARES} == {*LAYOUTS}
    layouts = Counter(scene.layout for scene in sampled())
    assert {*layouts} == {*LAYOUTS}
    assert layouts["large"] / 300 == pytest.approx(SHARES["large"], abs=0.1)
    assert {scene.background for scene in sampled()} == {*BACKGROUNDS}
    items = [item for scene in sampled() for item in set(scene.items)]
    assert {item.style for item in items} == {*STYLES}
    coloured = [item.colour is not None for item in items if dominant_hue(item.name, item.style) is not None]
    assert np.mean(coloured) == pytest.approx(RECOLOURED, abs=0.1)
    assert {item.colour for item in items} == {*COLOURS, None}


def test_items_of_a_scene_agree_with_its_layout() -> None:
    for each in sampled():
        assert len(each.items) == len(LAYOUTS[each.layout])
        assert len(set(each.items)) == (2 if each.layout in RELATIONS else 1)
        assert len({item.name for item in each.items}) == len(set(each.items))
        assert len({item.style for item in each.items}) == 1
        assert is_clear(each)


def test_a_wanted_layout_is_sampled() -> None:
    assert {sample_scene(np.random.default_rng(i), layout="above").layout for i in range(10)} == {"above"}


def combinations(each: Scene) -> set[tuple[str, ...]]:
    """What a scene combines, as rows of held_out.yaml after the name of their set."""
    rows = {("backgrounds", item.name, each.background) for item in each.items}
    rows |= {("colours", item.name, item.colour) for item in each.items}
    rows |= {("styles", item.name, item.style) for item in each.items}
    if each.layout in RELATIONS:
        first, second = (item.name for item in each.items)
        turned = (second, OPPOSITE[each.layout], first)
        rows.add(("relations", *(turned if each.layout in ("right of", "below") else (first, each.layout, second))))
    return rows


HELD_OUT = {(kind, *row) for kind, rows in held_out().items() for row in rows}


def test_sampled_scenes_have_no_held_out_combination_unless_they_may() -> None:
    assert not any(combinations(each) & HELD_OUT for each in sampled())
    free = [sample_scene(np.random.default_rng(i), held_out="may") for i in range(300)]
    found = [bool(combinations(each) & HELD_OUT) for each in free]
    assert sum(found) > 5
    assert [each.held_out for each in free] == found
    with pytest.raises(ValueError, match='held_out is "only"; it takes "never" or "may"'):
        sample_scene(np.random.default_rng(0), held_out="only")


def test_held_out_sets_have_their_sizes_and_can_be_drawn() -> None:
    sets = held_out()
    assert {kind: len(rows) for kind, rows in sets.items()} == {
        **{"backgrounds": 60, "colours": 60, "styles": 30, "relations": 60}
    }
    for name, background in sets["backgrounds"]:
        assert any(is_visible(Item(name, style), background) for style in STYLES), (name, background)
    for name, colour in sets["colours"]:
        assert colour in COLOURS
        assert any(dominant_hue(name, style) is not None for style in STYLES), (name, colour)
    for name, style in sets["styles"]:
        assert name in things()
        assert style in STYLES
    for first, relation, second in sets["relations"]:
        assert {first, second} <= {*things()}
        assert relation in ("left of", "above")


def test_each_held_out_set_recognises_its_scenes() -> None:
    for row in range(3):
        name, background = sorted(held_out()["backgrounds"])[row]
        assert held_out_by(Scene(background, "large", (Item(name, "noto"),)))[0]
        name, colour = sorted(held_out()["colours"])[row]
        assert held_out_by(scene("large", Item(name, "noto", colour)))[1]
        name, style = sorted(held_out()["styles"])[row]
        assert held_out_by(scene("large", Item(name, style)))[2]
        first, relation, second = sorted(held_out()["relations"])[row]
        items = Item(first, "noto"), Item(second, "noto")
        assert held_out_by(scene(relation, *items))[3]
        assert held_out_by(scene(OPPOSITE[relation], *items[::-1]))[3]
        assert not held_out_by(scene(relation, *items[::-1]))[3]
    assert not scene("left of", CAT, DOG).held_out


def test_backgrounds_are_twelve_different_colours() -> None:
    assert len(BACKGROUNDS) >= 12
    for a, b in product(BACKGROUNDS, BACKGROUNDS):
        assert a == b or np.abs(np.subtract(BACKGROUNDS[a], BACKGROUNDS[b])).sum() > 40


def test_white_items_are_refused_on_white_and_all_others_are_seen_by_their_outline() -> None:
    assert not is_visible(Item("cloud", "flat"), "white")
    assert is_visible(Item("cloud", "flat"), "blue")
    assert is_visible(Item("pig", "flat", "red"), "red")
    assert is_visible(Item("pig", "flat", "red"), "white")
    assert not is_clear(scene("large", Item("cloud", "flat"), background="white"))
    assert not is_clear(scene("left of", CAT, Item("cat", "noto", "blue")))


def test_another_is_never_the_current_one() -> None:
    rng = np.random.default_rng(0)
    assert {another(rng, BACKGROUNDS, "red") for _ in range(200)} == {*BACKGROUNDS} - {"red"}


def centre(picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The middle (x, y) of what differs between two pictures, as shares of a side."""
    rows, columns = (picture != other).any(axis=2).nonzero()
    return np.array([columns.min() + columns.max(), rows.min() + rows.max()]) / (2 * len(picture))


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_first_of_two_things_stands_in_the_relation_to_the_second(relation: str) -> None:
    whole = render(scene(relation, CAT, DOG))
    first = centre(whole, render(scene(relation, Item("panda", "noto"), DOG)))
    second = centre(whole, render(scene(relation, CAT, Item("panda", "noto"))))
    x, y = second - first
    assert {"left of": x, "right of": -x, "above": y, "below": -y}[relation] > 0.35
    assert min(abs(x), abs(y)) < 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawings_lie_in_their_boxes_and_these_in_the_picture(layout: str) -> None:
    for resolution in (64, 96):
        items = (CAT, DOG) if layout in RELATIONS else ()
        each = scene(layout, *items, background="light blue")
        drawn = (render(each, resolution) != BACKGROUNDS["light blue"]).any(axis=2)
        for left, top, side in boxes(each, resolution):
            assert min(left, top) > 0
            assert max(left, top) + side < resolution
            inside = drawn[top : top + side, left : left + side]
            assert max(inside.any(axis=0).sum(), inside.any(axis=1).sum()) >= side - 4
            drawn[top : top + side, left : left + side] = False
        assert not drawn.any()


def test_corners_and_sizes_are_what_their_names_say() -> None:
    empty = np.full((64, 64, 3), BACKGROUNDS["white"], np.uint8)
    for layout in CORNERS:
        x, y = centre(render(scene(layout)), empty)
        assert (y < 0.4, x < 0.4) == ("top" in layout, "left" in layout)
        assert (y > 0.6, x > 0.6) == ("bottom" in layout, "right" in layout)
    areas = [(render(scene(size)) != empty).any(axis=2).sum() for size in SIZES]
    assert areas[0] > 2 * areas[1]
    for number, layout in enumerate(COUNTS, start=2):
        assert len(boxes(scene(layout), 64)) == number


def test_a_small_drawing_has_the_same_pixels_at_every_place() -> None:
    places = set()
    for layout in LAYOUTS:
        if layout == "large":
            continue
        picture = render(scene(layout))
        for left, top, side in boxes(scene(layout), 64):
            assert left % (64 // GRID) == top % (64 // GRID) == 0
            places.add(picture[top : top + side, left : left + side].tobytes())
    assert len(places) == 1


def test_drawings_have_a_white_outline_of_three_pixels() -> None:
    picture = render(scene("large", Item("tomato", "flat"), background="blue"), 128)
    inside = (picture != BACKGROUNDS["blue"]).any(axis=2)
    for line, found in ((picture[64], inside[64]), (picture[:, 64], inside[:, 64])):
        first = int(found.argmax())
        white = (line[first : first + 16] > 235).all(axis=1)
        assert 4 <= white.sum() <= 7  # six at 128 pixels, with soft edges


def test_edges_are_blended_in_srgb() -> None:
    each = scene("large", Item("tomato", "flat"), background="blue")
    [(left, top, side)] = boxes(each, 64)
    drawn = sprite(each.items[0], side, 1).astype(float)
    alpha = drawn[..., 3:] / 255
    assert 0.02 < ((alpha > 0.1) & (alpha < 0.9)).mean() < 0.3
    wanted = (drawn[..., :3] + (1 - alpha) * BACKGROUNDS["blue"]).clip(0, 255)
    found = render(each)[top : top + side, left : left + side]
    assert np.abs(found - wanted).max() <= 1


def test_a_larger_picture_shows_the_same_scene() -> None:
    for each in sampled()[:10]:
        small, large = render(each, 64), Image.fromarray(render(each, 128))
        reduced = np.asarray(large.resize((64, 64), Image.Resampling.BOX))
        assert np.abs(reduced.astype(int) - small).mean() < 6
    with pytest.raises(AssertionError, match="100"):
        render(sampled()[0], 100)


def test_a_recoloured_thing_has_the_colour_in_the_picture() -> None:
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        picture = render(scene("large", Item("pig", "flat", colour)))[16:48, 16:48]
        assert picture.reshape(-1, 3).mean(axis=0).argmax() == channel
