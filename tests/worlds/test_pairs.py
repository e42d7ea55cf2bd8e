"""shapes/pairs.py: near misses, true captions, spoilt pictures."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from clip_gen.worlds.shapes.captions import Description, ItemDescription, describe
from clip_gen.worlds.shapes.judge import read, satisfies
from clip_gen.worlds.shapes.pairs import (
    CHOICES,
    UNSAID,
    CaptionedPairs,
    HardPictures,
    NearMisses,
    RenderedPictures,
    _first_scene,
    _numbers,
    answers,
    fits,
    near_miss,
    training_rng,
)
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Item, Scene, sample_scene
from clip_gen.worlds.shapes.spoiling import spoil


def rows(*scenes: Scene) -> torch.Tensor:
    return torch.from_numpy(np.stack([_numbers(describe(scene)) for scene in scenes]))


def test_a_picture_depends_on_seed_and_number_alone() -> None:
    assert np.array_equal(RenderedPictures(5, 1, 64)[3], RenderedPictures(99, 1, 64)[3])
    assert not np.array_equal(RenderedPictures(5, 1, 64)[3], RenderedPictures(5, 2, 64)[3])
    with pytest.raises(IndexError):
        RenderedPictures(5, 1, 64)[5]


def test_training_pictures_are_not_those_of_a_folder_of_the_same_seed() -> None:
    folder = [render(sample_scene(np.random.default_rng([1, i]))) for i in range(20)]
    training = [RenderedPictures(20, 1, 64)[i] for i in range(20)]
    assert not any(np.array_equal(a, b) for a in folder for b in training)


def test_the_generators_pictures_hold_no_held_out_pair() -> None:
    for i in range(300):
        shown = read(RenderedPictures(300, 7, 64)[i])
        assert not {(item.colour, item.shape) for item in shown.items} & HELD_OUT


def test_every_second_hard_picture_shows_a_small_star() -> None:
    hard, usual = HardPictures(80, 7, 64), RenderedPictures(80, 7, 64)
    for i in range(0, 80, 2):
        assert np.array_equal(hard[i], usual[i])
        items = read(hard[i + 1]).items
        assert any((item.shape, item.size) == ("star", "small") for item in items)
        assert not {(item.colour, item.shape) for item in items} & HELD_OUT
    assert len({hard[i].tobytes() for i in range(80)}) == 80
    with pytest.raises(IndexError):
        hard[80]


def test_in_a_near_miss_shapes_or_colours_have_changed_hands_and_nothing_has_moved() -> None:
    swapped = 0
    for i in range(300):
        picture, missed = RenderedPictures(300, 7, 64)[i], NearMisses(300, 7, 64)[i]
        shown, other = read(picture).items, read(missed).items
        assert not {(item.colour, item.shape) for item in other} & HELD_OUT
        for attribute in ("shape", "colour", "size"):
            assert sorted(getattr(item, attribute) for item in shown) == sorted(
                getattr(item, attribute) for item in other
            )
        if not np.array_equal(picture, missed):
            assert len(shown) == 2
            swapped += 1
            changed = (picture != missed).any(axis=2).nonzero()
            there = (picture != picture[0, 0]).any(axis=2).nonzero()
            for now, before in zip(changed, there, strict=True):
                # Not every shape reaches all four sides of its box.
                assert before.min() - 5 <= now.min() <= now.max() <= before.max() + 5
    assert 110 < swapped < 160


def test_every_caption_is_true_of_its_own_picture_and_seldom_of_its_near_misses() -> None:
    groups = [CaptionedPairs(50, 0, 64)[i] for i in range(50)]
    true = [fits(torch.from_numpy(g.stated), torch.from_numpy(g.shown)) for g in groups]
    assert all(each.diagonal().all() for each in true)
    others = torch.stack([each[~torch.eye(4, dtype=torch.bool)] for each in true])
    assert 0.05 < others.float().mean() < 0.5


def test_a_groups_first_picture_has_another_caption_as_true_that_says_less() -> None:
    names, pairs = {*SHAPES, *COLOURS, *BACKGROUNDS}, CaptionedPairs(200, 3, 64)
    said = shown = 0
    for i in range(200):
        picture, (caption, shorter) = pairs.first(i)
        scene = _first_scene(training_rng(3, i))
        assert np.array_equal(picture, render(scene, 64))
        assert caption == pairs[i].captions[0]
        true = {scene.background, *(name for item in scene.items for name in (item.shape, item.colour))}
        told = {word for word in re.findall("[a-z]+", shorter) if word in names}
        assert told <= true
        said, shown = said + len(told), shown + len(true)
    assert said < 0.4 * shown
    assert pairs.first(5)[1] == CaptionedPairs(6, 3, 64).first(5)[1]


def test_a_caption_fits_a_scene_told_from_either_item() -> None:
    red, blue = Item("circle", "red", "large"), Item("star", "blue", "small")
    scene = Scene("white", (red, blue), "left of")
    turned = Scene("white", (blue, red), "right of")
    swapped = Scene("white", (blue, red), "left of")
    assert fits(rows(scene), rows(scene, turned, swapped)).tolist() == [[True, True, False]]


def test_a_scene_gives_the_same_answers_from_whichever_item_it_is_told() -> None:
    red, blue = Item("circle", "red", "large"), Item("star", "blue", "small")
    below, above = Scene("black", (red, blue), "below"), Scene("black", (blue, red), "above")
    assert answers(rows(below, above)).tolist() == 2 * [[1, 2, 3, 2, 0, 0, 0, 1]]
    swapped, beside = Scene("black", (red, blue), "above"), Scene("black", (red, blue), "left of")
    assert answers(rows(swapped, beside)).tolist() == [[1, 2, 0, 0, 1, 3, 2, 0], [1, 1, 0, 0, 1, 3, 2, 0]]


def test_there_is_no_answer_where_nothing_is_said() -> None:
    star, thing = ItemDescription("star", "blue"), ItemDescription()
    said = [Description((star,)), Description((star, thing), "white"), Description((star, thing), None, "right of")]
    found = answers(torch.from_numpy(np.stack([_numbers(each) for each in said])))
    nothing = UNSAID
    assert found.tolist() == [
        [nothing, 0, 3, 2, nothing, nothing, nothing, nothing],
        [0, *7 * [nothing]],  # which of the two is on the left or above?
        [nothing, 1, nothing, nothing, nothing, 3, 2, nothing],
    ]


def test_every_question_has_as_many_choices_as_its_answers_need() -> None:
    found = answers(torch.cat([torch.from_numpy(CaptionedPairs(300, 0, 64)[i].shown) for i in range(300)]))
    assert (found.max(dim=0).values + 1).tolist() == list(CHOICES)


def test_a_near_miss_is_another_scene_of_this_world() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng, held_out="may")
        other = near_miss(scene, rng)
        assert not fits(rows(scene), rows(other)).item()
        assert satisfies(read(render(other)), describe(other))


def test_spoilt_pictures_are_seldom_what_the_caption_says() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(200)]
    right = [satisfies(read(spoil(scene, rng, 64)), describe(scene)) for scene in scenes]
    assert np.mean(right) < 0.1
