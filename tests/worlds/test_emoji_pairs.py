"""worlds/emoji/pairs.py and spoiling.py: near misses, true captions, answers, spoilt pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from clip_gen.config import read_config
from clip_gen.worlds.clip_trainer import UNSAID
from clip_gen.worlds.emoji.captions import Description, ThingDescription, describe, swapped
from clip_gen.worlds.emoji.drawings import COLOURS, STYLES
from clip_gen.worlds.emoji.pairs import (
    CHOICES,
    NAMES,
    NATURAL,
    CaptionedPairs,
    CaptionedPictures,
    HardPictures,
    NearMisses,
    RenderedPictures,
    answers,
    fits,
    near_miss,
    sampled_caption,
    shown_answers,
)
from clip_gen.worlds.emoji.recipe import WORLD
from clip_gen.worlds.emoji.rendering import render
from clip_gen.worlds.emoji.sampling import is_clear
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, COUNTS, LAYOUTS, RELATIONS, Item, Scene
from clip_gen.worlds.emoji.spoiling import spoil
from clip_gen.worlds.emoji.words import things
from clip_gen.worlds.pairs import GROUP, PairGroup
from clip_gen.worlds.recipe import CONFIGS
from clip_gen.worlds.recipe_config import RecipeConfig

CAT, DOG = Item("cat", "noto"), Item("dog", "noto", "blue")
CATS_AND_DOGS = Scene("white", "left of", (CAT, DOG))
COUNT = 50


@cache
def groups() -> list[PairGroup]:
    return [CaptionedPairs(COUNT, 0, 64)[i] for i in range(COUNT)]


def test_a_picture_depends_only_on_seed_and_number() -> None:
    assert np.array_equal(RenderedPictures(5, 1, 64)[3], RenderedPictures(99, 1, 64)[3])
    assert not np.array_equal(RenderedPictures(5, 1, 64)[3], RenderedPictures(5, 2, 64)[3])
    with pytest.raises(IndexError):
        RenderedPictures(5, 1, 64)[5]
    first, again = CaptionedPairs(5, 1, 64)[3], CaptionedPairs(9, 1, 64)[3]
    assert first.captions == again.captions
    assert np.array_equal(first.pictures, again.pictures)
    assert np.array_equal(first.spoilt, again.spoilt)


def test_hard_pictures_have_more_colours_and_more_with_two_things() -> None:
    usual, hard = (
        [kind(400, 1, 64).scene(np.random.default_rng(i)) for i in range(400)]
        for kind in (RenderedPictures, HardPictures)
    )
    assert not any(scene.held_out for scene in hard)
    for counted in (lambda scene: scene.layout in RELATIONS, lambda scene: scene.items[0].colour is not None):
        assert 1.4 * sum(map(counted, usual)) < sum(map(counted, hard)) < 300


def test_pictures_and_near_misses_have_nothing_held_out_and_those_of_clip_do() -> None:
    for kind in (RenderedPictures, NearMisses):
        pictures = kind(200, 7, 64)
        assert not any(pictures.scene(pictures.rng(i)).held_out for i in range(200))
    captioned = CaptionedPictures(200, 7, 64)
    assert any(captioned.scene(captioned.rng(i)).held_out for i in range(200))


def test_near_misses_have_the_same_names_colours_and_places() -> None:
    pictures, missed = RenderedPictures(200, 7, 64), NearMisses(200, 7, 64)
    changed = 0
    for i in range(200):
        scene, other = pictures.scene(pictures.rng(i)), missed.scene(missed.rng(i))
        assert (scene.background, scene.layout) == (other.background, other.layout)
        for field in ("name", "style", "colour"):
            assert sorted(str(getattr(item, field)) for item in scene.items) == sorted(
                str(getattr(item, field)) for item in other.items
            )
        if scene != other:
            assert scene.layout in RELATIONS
            assert not np.array_equal(pictures[i], missed[i])
            assert not fits([describe(scene)], [describe(other)]).item()
            changed += 1
    assert 0.15 < changed / 200 < 0.35  # a quarter of the scenes has a relation


def test_captions_are_true_of_their_picture_and_seldom_of_near_misses() -> None:
    true = [fits(group.stated, group.shown) for group in groups()]
    assert all(each.diagonal().all() for each in true)
    others = torch.stack([each[~torch.eye(GROUP, dtype=torch.bool)] for each in true])
    assert 0.02 < others.float().mean() < 0.5


CHANGES = {
    "background": replace(CATS_AND_DOGS, background="pink"),
    "relation": replace(CATS_AND_DOGS, layout="right of"),
    "order": replace(CATS_AND_DOGS, items=(DOG, CAT)),
    "name": replace(CATS_AND_DOGS, items=(replace(CAT, name="fox"), DOG)),
    "colour": replace(CATS_AND_DOGS, items=(CAT, replace(DOG, colour="red"))),
    "no colour": replace(CATS_AND_DOGS, items=(CAT, replace(DOG, colour=None))),
    "exchanged colours": replace(CATS_AND_DOGS, items=(replace(CAT, colour="blue"), replace(DOG, colour=None))),
    "style": replace(CATS_AND_DOGS, items=(replace(CAT, style="3d"), replace(DOG, style="3d"))),
    "one thing less": Scene("white", "large", (CAT,)),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_caption_does_not_fit_a_changed_scene(changed: Scene) -> None:
    assert fits([describe(CATS_AND_DOGS)], [describe(CATS_AND_DOGS)]).item()
    assert not fits([describe(CATS_AND_DOGS)], [describe(changed)]).item()


def test_a_caption_fits_a_scene_in_either_order_of_its_things() -> None:
    turned = Scene("white", "right of", (DOG, CAT))
    assert fits([describe(CATS_AND_DOGS)], [describe(turned)]).item()
    assert fits([swapped(describe(CATS_AND_DOGS))], [describe(CATS_AND_DOGS)]).item()


def scenes() -> dict[str, Scene]:
    return {
        "pair": CATS_AND_DOGS,
        "large": Scene("white", "large", (CAT,)),
        "corner": Scene("blue", "top left", (replace(CAT, style="flat"),)),
        "three": Scene("white", "three", (CAT,) * 3),
        "cars": Scene("white", "two", (Item("automobile", "noto"),) * 2),
    }


@pytest.mark.parametrize(
    ("stated", "true_of"),
    [
        (Description((ThingDescription("cat"),)), {"large", "corner"}),
        (Description((ThingDescription("cat"),), many=True), {"three"}),
        (Description((ThingDescription(),), many=True), {"three", "cars"}),
        (Description((ThingDescription(kind="animal"),)), {"large", "corner"}),
        (Description((ThingDescription(kind="vehicle"),), many=True), {"cars"}),
        (Description((ThingDescription(),), background="blue"), {"corner"}),
        (Description((ThingDescription(),), style="noto"), {"large"}),
        (Description((ThingDescription(kind="pet"), ThingDescription("cat"))), {"pair"}),
        (Description((ThingDescription(colour="blue"), ThingDescription("cat"))), {"pair"}),
        (Description((ThingDescription("dog"), ThingDescription("cat", colour="blue"))), set()),
        (Description((ThingDescription("cat"), ThingDescription()), layout="right of"), set()),
    ],
)
def test_a_shorter_caption_fits_all_scenes_that_it_is_true_of(stated: Description, true_of: set[str]) -> None:
    right = fits([stated], [describe(scene) for scene in scenes().values()])[0]
    assert {name for name, fit in zip(scenes(), right, strict=True) if fit} == true_of


def test_answers_say_what_the_scene_shows() -> None:
    for group in groups():
        for shown in group.shown:
            background, layout, style, *rest = shown_answers(shown)
            said = swapped(shown) if shown.layout in ("right of", "below") else shown
            assert list(BACKGROUNDS)[background] == said.background
            assert list(LAYOUTS)[layout] == said.layout
            assert STYLES[style] == said.style
            for thing, name, colour in zip(said.things, rest[::2], rest[1::2], strict=False):
                assert NAMES[name] == thing.name
                assert (*COLOURS, None)[colour] == thing.colour
            assert rest[2 * len(said.things) :] == [UNSAID] * (4 - 2 * len(said.things))


def test_stated_answers_are_those_of_the_picture_or_unsaid() -> None:
    for group in groups():
        for stated, shown in zip(group.stated, group.shown, strict=True):
            for said, seen in zip(answers(stated), shown_answers(shown), strict=True):
                assert said in (seen, UNSAID)


def test_answers_do_not_depend_on_the_order_of_things() -> None:
    for relation in RELATIONS:
        description = describe(replace(CATS_AND_DOGS, layout=relation))
        assert answers(description) == answers(swapped(description))
        assert shown_answers(description) == shown_answers(swapped(description))
    assert shown_answers(describe(CATS_AND_DOGS))[4] == NATURAL
    # Which of the two is on the left?
    assert answers(replace(describe(CATS_AND_DOGS), layout=None))[3:] == [UNSAID] * 4


def test_answers_are_in_the_range_of_their_question() -> None:
    found = torch.tensor([shown_answers(shown) for group in groups() for shown in group.shown])
    assert (found < torch.tensor(CHOICES)).all()
    assert (found.min(dim=0).values >= UNSAID).all()
    assert len(NAMES) == len(things()) == CHOICES[3] == CHOICES[5]


def test_a_batch_joins_groups() -> None:
    two = groups()[:2]
    batch = WORLD.collate(40)(two)
    assert batch.pictures.shape == (8, 64, 64, 3)
    assert batch.spoilt.shape == (2, 64, 64, 3)
    assert batch.tokens.shape == (8, 40)
    assert torch.equal(batch.is_true[4:, 4:], fits(two[1].stated, two[1].shown))
    assert batch.stated[5].tolist() == answers(two[1].stated[1])
    assert batch.shown[5].tolist() == shown_answers(two[1].shown[1])
    assert len(CHOICES) == batch.shown.shape[1]


def test_captions_are_shorter_than_clip_reads() -> None:
    tokenize = WORLD.collate(read_config(CONFIGS / "emoji.yaml", RecipeConfig).model.clip.context_length).tokenize
    for group in groups():
        for caption in group.captions:
            assert not tokenize.left_out(caption), caption


def test_a_near_miss_is_another_clear_scene_that_the_caption_does_not_fit() -> None:
    rng = np.random.default_rng(0)
    pictures = CaptionedPictures(150, 3, 64)
    for i in range(150):
        scene = pictures.scene(pictures.rng(i))
        other = near_miss(scene, rng)
        assert is_clear(other)
        assert other.layout in LAYOUTS
        assert len(other.items) == len(LAYOUTS[other.layout])
        # A caption without a colour fits every colour; then that of the near miss has one.
        here, there = [describe(scene)], [describe(other)]
        assert not (fits(here, there).item() and fits(there, here).item()), (scene, other)


def test_a_captioned_picture_shows_its_scene_and_the_second_caption_is_shorter() -> None:
    pictures, lengths = CaptionedPictures(100, 3, 64), np.zeros(2)
    for i in range(100):
        picture, captions = pictures[i]
        assert np.array_equal(picture, render(pictures.scene(pictures.rng(i)), 64))
        lengths += [len(caption.split()) for caption in captions]
    assert lengths[1] < 0.85 * lengths[0]
    assert isinstance(sampled_caption(np.random.default_rng(0)), str)


def test_spoilt_pictures_differ_from_the_true_ones() -> None:
    rng = np.random.default_rng(0)
    changes = []
    for layout in LAYOUTS:
        items = (CAT, DOG) if layout in RELATIONS else (CAT,) * len(LAYOUTS[layout])
        scene = Scene("pink", layout, items)
        for _ in range(8):
            spoilt = spoil(scene, rng, 64)
            assert (spoilt.shape, spoilt.dtype) == ((64, 64, 3), np.uint8)
            changes.append(np.abs(spoilt.astype(int) - render(scene)).max(axis=2))
    assert np.mean([(change > 40).mean() > 0.003 for change in changes]) > 0.85
    assert {len(LAYOUTS[count]) for count in COUNTS} == {2, 3, 4}
