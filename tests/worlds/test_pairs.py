"""shapes/pairs.py: near misses, true captions, spoilt pictures."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from clip_gen.worlds.clip_trainer import UNSAID
from clip_gen.worlds.shapes.captions import Description, ItemDescription, describe
from clip_gen.worlds.shapes.judge import read, satisfies
from clip_gen.worlds.shapes.pairs import (
    CHOICES,
    CaptionedPairs,
    CaptionedPictures,
    HardPictures,
    NearMisses,
    RenderedPictures,
    answers,
    fits,
    near_miss,
)
from clip_gen.worlds.shapes.recipe import WORLD
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Item, Scene, sample_scene
from clip_gen.worlds.shapes.spoiling import spoil


def test_a_picture_depends_only_on_seed_and_number() -> None:
    assert np.array_equal(RenderedPictures(5, 1, 64)[3], RenderedPictures(99, 1, 64)[3])
    assert not np.array_equal(RenderedPictures(5, 1, 64)[3], RenderedPictures(5, 2, 64)[3])
    with pytest.raises(IndexError):
        RenderedPictures(5, 1, 64)[5]


def test_training_pictures_differ_from_a_folder_of_the_same_seed() -> None:
    folder = [render(sample_scene(np.random.default_rng([1, i]))) for i in range(20)]
    training = [RenderedPictures(20, 1, 64)[i] for i in range(20)]
    assert not any(np.array_equal(a, b) for a in folder for b in training)


def test_pictures_of_the_generator_have_no_held_out_pair() -> None:
    for i in range(300):
        shown = read(RenderedPictures(300, 7, 64)[i])
        assert not {(item.colour, item.shape) for item in shown.items} & HELD_OUT


def test_every_second_hard_picture_has_a_small_star() -> None:
    hard, usual = HardPictures(80, 7, 64), RenderedPictures(80, 7, 64)
    for i in range(0, 80, 2):
        assert np.array_equal(hard[i], usual[i])
        items = read(hard[i + 1]).items
        assert any((item.shape, item.size) == ("star", "small") for item in items)
        assert not {(item.colour, item.shape) for item in items} & HELD_OUT
    assert len({hard[i].tobytes() for i in range(80)}) == 80
    with pytest.raises(IndexError):
        hard[80]


def test_near_misses_swap_shapes_or_colours_and_move_nothing() -> None:
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


def test_captions_are_true_of_their_picture_and_seldom_of_near_misses() -> None:
    groups = [CaptionedPairs(50, 0, 64)[i] for i in range(50)]
    true = [fits(group.stated, group.shown) for group in groups]
    assert all(each.diagonal().all() for each in true)
    others = torch.stack([each[~torch.eye(4, dtype=torch.bool)] for each in true])
    assert 0.05 < others.float().mean() < 0.5


def test_a_batch_joins_groups() -> None:
    groups = [CaptionedPairs(2, 0, 16)[i] for i in range(2)]
    batch = WORLD.collate(32)(groups)
    assert batch.pictures.shape == (8, 16, 16, 3)
    assert batch.spoilt.shape == (2, 16, 16, 3)
    assert batch.tokens.shape == (8, 32)
    assert torch.equal(batch.is_true[4:, 4:], fits(groups[1].stated, groups[1].shown))
    assert batch.shown[5].tolist() == answers(groups[1].shown[1])


def test_a_captioned_picture_has_two_true_captions_one_of_them_shorter() -> None:
    names, pictures = {*SHAPES, *COLOURS, *BACKGROUNDS}, CaptionedPictures(200, 3, 64)
    said, shown = [0, 0], 0
    for i in range(200):
        picture, captions = pictures[i]
        scene = pictures.scene(i, pictures.rng(i))
        assert np.array_equal(picture, render(scene, 64))
        true = {scene.background, *(name for item in scene.items for name in (item.shape, item.colour))}
        for which, caption in enumerate(captions):
            words = {word for word in re.findall("[a-z]+", caption.replace("grey", "gray")) if word in names}
            assert words <= true
            said[which] += len(words)
        shown += len(true)
    assert said[1] < 0.4 * shown < 0.6 * shown < said[0]
    assert pictures[5][1] == CaptionedPictures(6, 3, 64)[5][1]


def test_a_caption_fits_a_scene_in_either_order_of_its_items() -> None:
    red, blue = Item("circle", "red", "large"), Item("star", "blue", "small")
    scene, turned = Scene("white", (red, blue), "left of"), Scene("white", (blue, red), "right of")
    swapped = Scene("white", (blue, red), "left of")
    shown = [describe(each) for each in (scene, turned, swapped)]
    assert fits([describe(scene)], shown).tolist() == [[True, True, False]]


def test_answers_do_not_depend_on_the_order_of_items() -> None:
    red, blue = Item("circle", "red", "large"), Item("star", "blue", "small")
    below, above = Scene("black", (red, blue), "below"), Scene("black", (blue, red), "above")
    assert answers(describe(below)) == answers(describe(above)) == [1, 2, 3, 2, 0, 0, 0, 1]
    assert answers(describe(Scene("black", (red, blue), "above"))) == [1, 2, 0, 0, 1, 3, 2, 0]
    assert answers(describe(Scene("black", (red, blue), "left of"))) == [1, 1, 0, 0, 1, 3, 2, 0]


def test_descriptions_give_no_answer_to_what_they_leave_unsaid() -> None:
    star, thing = ItemDescription("star", "blue"), ItemDescription()
    assert answers(Description((star,))) == [UNSAID, 0, 3, 2, *4 * [UNSAID]]
    # Which of the two is on the left or above?
    assert answers(Description((star, thing), "white")) == [0, *7 * [UNSAID]]
    assert answers(Description((star, thing), None, "right of")) == [UNSAID, 1, *3 * [UNSAID], 3, 2, UNSAID]


def test_every_question_has_as_many_choices_as_its_answers_need() -> None:
    groups = [CaptionedPairs(300, 0, 16)[i] for i in range(300)]
    found = torch.tensor([answers(description) for group in groups for description in group.shown])
    assert (found.max(dim=0).values + 1).tolist() == list(CHOICES)


def test_a_near_miss_is_another_scene_of_this_world() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng, held_out="may")
        other = near_miss(scene, rng)
        assert not fits([describe(scene)], [describe(other)]).item()
        assert satisfies(read(render(other)), describe(other))


def test_captions_are_seldom_true_of_spoilt_pictures() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(200)]
    right = [satisfies(read(spoil(scene, rng, 64)), describe(scene)) for scene in scenes]
    assert np.mean(right) < 0.1
