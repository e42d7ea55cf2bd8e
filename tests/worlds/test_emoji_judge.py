"""worlds/emoji/judge.py, templates.py and judge_network.py: they read renders, also degraded ones; and what they grade.

The tests share the templates of all drawings, which take a process 13 seconds.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_networks
from PIL import Image, ImageFilter

from clip_gen.__main__ import main
from clip_gen.weights.model_folder import save_networks
from clip_gen.worlds.emoji import judge_network
from clip_gen.worlds.emoji.captions import Description, ThingDescription, describe, swapped
from clip_gen.worlds.emoji.drawings import COLOURS, drawing
from clip_gen.worlds.emoji.judge import grade, read, satisfies
from clip_gen.worlds.emoji.judge_network import NameNetwork, read_drawings, renamed, train, varied
from clip_gen.worlds.emoji.prompts import KINDS, cases
from clip_gen.worlds.emoji.rendering import boxes, render, sprite
from clip_gen.worlds.emoji.sampling import sample_scene
from clip_gen.worlds.emoji.scenes import BACKGROUNDS, LAYOUTS, Item, Scene
from clip_gen.worlds.emoji.spoiling import spoil
from clip_gen.worlds.emoji.templates import natural_colours, templates
from clip_gen.worlds.emoji.words import things

CAT, DOG, APPLE = Item("cat", "noto"), Item("dog", "noto", "purple"), Item("red apple", "flat")
PAIR = Scene("white", "left of", (CAT, DOG))
NAME = {"name": True, "name in the top 5": True}


def random_scenes(number: int, **options: object) -> list[Scene]:
    return [sample_scene(np.random.default_rng([51, i]), held_out="may", **options) for i in range(number)]


def share_right(scenes: list[Scene], change: Callable[[np.ndarray], np.ndarray], resolution: int = 128) -> float:
    return float(np.mean([satisfies(read(change(render(scene, resolution))), describe(scene)) for scene in scenes]))


def unchanged(picture: np.ndarray) -> np.ndarray:
    return picture


@pytest.mark.parametrize(("count", "resolution", "least"), [(80, 128, 0.99), (40, 64, 0.95)])
def test_renders_are_read_correctly(count: int, resolution: int, least: float) -> None:
    """Takes some seconds once: the templates of all drawings. They are those of pictures of 128 pixels."""
    assert share_right(random_scenes(count), unchanged, resolution) >= least


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str) -> None:
    for scene in random_scenes(5, layout=layout):
        assert satisfies(read(render(scene, 128)), Description(describe(scene).things, describe(scene).many, layout))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_background_is_read_also_with_a_slight_tint(background: str) -> None:
    tinted = render(Scene(background, "large", (CAT,))).astype(int) + np.array([9, -9, 9])
    assert read(tinted.clip(0, 255).astype(np.uint8)).background == background


def noisy(picture: np.ndarray) -> np.ndarray:
    return (picture + np.random.default_rng(3).normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8)


def blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.2)))


def compressed(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=60)
    return np.asarray(Image.open(file))


def shifted(picture: np.ndarray) -> np.ndarray:
    return np.roll(picture, (2, -2), axis=(0, 1))


@pytest.mark.parametrize("change", [noisy, blurred, compressed, shifted])
def test_slight_faults_do_not_matter(change: Callable[[np.ndarray], np.ndarray]) -> None:
    assert share_right(random_scenes(40), change) >= 0.95


def test_few_spoilt_pictures_are_read_as_what_they_were() -> None:
    right = [
        satisfies(read(spoil(scene, np.random.default_rng(i), 128)), describe(scene))
        for i, scene in enumerate(random_scenes(80))
    ]
    assert np.mean(right) <= 0.2


def test_a_strong_blur_litter_and_half_a_drawing_are_not_right() -> None:
    for i, scene in enumerate(random_scenes(10, layout="large")):
        picture, (_, top, side) = render(scene, 128), boxes(scene, 128)[0]
        half = picture.copy()
        half[top + side // 2 :] = BACKGROUNDS[scene.background]
        littered = picture.copy()
        littered[2:14, 2:14] = np.uint8(255) - picture[0, 0] // 2
        small = Image.fromarray(picture).resize((6, 6)).resize((128, 128), Image.Resampling.BICUBIC)
        noise = np.random.default_rng(i).integers(0, 256, picture.shape, dtype=np.uint8)
        for spoilt in (half, np.asarray(small), noise, np.full_like(picture, BACKGROUNDS[scene.background])):
            assert not satisfies(read(spoilt), Description((ThingDescription(scene.items[0].name),))), scene
        assert read(littered) is None


def test_a_mixture_of_two_things_is_not_clear() -> None:
    first, second = (render(Scene("white", "large", (item,))) for item in (CAT, Item("tomato", "noto")))
    mixed = (first.astype(int) + second) // 2
    assert not read(mixed.astype(np.uint8)).clean


def test_templates_have_the_colours_of_recoloured_drawings() -> None:
    table = templates(48)
    for name, style in (("cat", "noto"), ("umbrella", "flat"), ("pig", "3d")):
        for colour in COLOURS:
            row = table.items.index(Item(name, style, colour))
            true = sprite(Item(name, style, colour), 96, 2).reshape(12, 8, 12, 8, 4).mean(axis=(1, 3)) / 255
            assert abs(table.matrix[row].reshape(4, 12, 12).transpose(1, 2, 0) - true).mean() < 0.01


def test_a_drawing_in_the_artists_colours_has_a_colour_by_itself() -> None:
    assert natural_colours("red apple", "flat") == {"red"}
    assert natural_colours("panda", "noto") == frozenset()
    apple = read(render(Scene("white", "large", (APPLE,)), 128))
    assert grade(apple, Description((ThingDescription("red apple", colour="red"),)))["colour"]
    assert not grade(apple, Description((ThingDescription("red apple", colour="blue"),)))["colour"]
    green = read(render(Scene("white", "large", (replace(APPLE, colour="green"),)), 128))
    assert grade(green, Description((ThingDescription("red apple", colour="green"),)))["colour"]
    assert not grade(green, Description((ThingDescription("red apple", colour="red"),)))["colour"]


def test_only_stated_attributes_are_graded() -> None:
    reading = read(render(PAIR, 128))
    assert grade(reading, Description((ThingDescription("cat"), ThingDescription()))) == {
        "count": True,
        **NAME,
        "thing": True,
    }
    assert grade(reading, describe(PAIR)) == {
        "count": True,
        "relation": True,
        "background": True,
        **NAME,
        "style": True,
        "colour": True,
    }


def test_a_kind_is_right_for_every_thing_of_it() -> None:
    reading = read(render(Scene("blue", "small", (CAT,)), 128))
    assert grade(reading, Description((ThingDescription(kind="animal"),))) == {"count": True, "kind": True}
    assert grade(reading, Description((ThingDescription(kind="fruit"),))) == {"count": True, "kind": False}


def test_the_order_of_two_things_does_not_matter_but_their_relation_does() -> None:
    reading = read(render(PAIR, 128))
    assert satisfies(reading, swapped(describe(PAIR)))
    exchanged = replace(describe(PAIR), things=describe(PAIR).things[::-1])
    assert not satisfies(reading, exchanged)
    assert satisfies(reading, replace(exchanged, layout=None))
    colours = Description((ThingDescription("cat", colour="purple"), ThingDescription("dog")))
    assert not satisfies(reading, colours)


def test_counts_and_places_are_graded() -> None:
    three = read(render(Scene("white", "three", (CAT,) * 3), 128))
    cats = Description((ThingDescription("cat"),), many=True)
    assert satisfies(three, cats)
    assert satisfies(three, replace(cats, layout="three"))
    assert grade(three, replace(cats, layout="two")) == {"count": False, **NAME}
    assert not satisfies(three, Description((ThingDescription("cat"),)))
    corner = read(render(Scene("white", "top left", (CAT,)), 128))
    one = Description((ThingDescription("cat"),), layout="bottom left")
    assert grade(corner, one) == {"count": True, "position": False, **NAME}
    assert grade(corner, replace(one, layout="large")) == {"count": True, "size": False, **NAME}
    assert not satisfies(corner, cats)


def test_without_a_reading_everything_stated_is_wrong() -> None:
    grades = grade(None, describe(PAIR))
    assert set(grades) == set(grade(read(render(PAIR, 128)), describe(PAIR)))
    assert not any(grades.values())


# The second judge

NAMES = ("cat", "tomato", "umbrella")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    for artist in ("noto", "flat"):
        (folder / artist).mkdir()
        for name in NAMES:
            Image.fromarray(drawing(name, artist)).save(folder / artist / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Iterator[NameNetwork]:
    with torch.random.fork_rng():
        yield train(*read_drawings(folder), steps=40)


def test_drawings_leave_room_for_the_outline(folder: Path) -> None:
    drawings, numbers = read_drawings(folder)
    assert drawings.shape == (6, 4, 32, 32)
    assert {list(things())[number] for number in numbers.tolist()} == set(NAMES)
    rows, columns = (drawings[:, 3] > 0.5).any(dim=2), (drawings[:, 3] > 0.5).any(dim=1)
    for index in range(6):
        assert max(int(rows[index].sum()), int(columns[index].sum())) in (25, 26)
        assert not drawings[index, :, [0, 1, -2, -1]].any()


def test_a_folder_without_drawings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no ARTIST/NAME\.png"):
        read_drawings(tmp_path)


def test_views_differ_and_are_offsets_from_a_background(folder: Path) -> None:
    drawings, _ = read_drawings(folder)
    views = varied(drawings[:1].repeat(8, 1, 1, 1))
    assert views.shape == (8, 3, 32, 32)
    assert abs(views).max() <= 1.5
    assert (views[0] - views[1:]).abs().mean(dim=(1, 2, 3)).min() > 0.01


def test_it_names_the_things_that_it_learnt(trained: NameNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_network, "network", lambda: trained)
    monkeypatch.setattr(judge_network, "MIN_CONFIDENCE", 0.0)
    scene = Scene("white", "left of", (Item("tomato", "noto"), Item("cat", "noto")))
    picture = render(scene, 128)
    reading = read(picture)
    again = renamed(reading, picture)
    assert [thing.names[0] for thing in again.things] == ["tomato", "cat"]
    assert again.clean
    assert (again.background, again.layout, again.things[0].style) == ("white", "left of", "noto")
    monkeypatch.setattr(judge_network, "MIN_CONFIDENCE", 1.0)
    assert not renamed(reading, picture).clean
    assert renamed(None, picture) is None


# What the judges grade


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_depend_on_seed_and_number_and_fit_their_scene(kind: str) -> None:
    chosen = cases(kind, 20, seed=0)
    assert cases(kind, 5, seed=0) == chosen[:5]
    assert cases(kind, 5, seed=1) != chosen[:5]
    assert sum(satisfies(read(render(case.scene)), case.description) for case in chosen) >= 19


def test_evaluate_takes_the_world_from_the_models_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    config = replace(TINY, name="emoji", vqgan=replace(TINY.vqgan, resolution=64, patch=16))
    save_networks(tiny_networks(config=config), model, training={})
    words = [
        "evaluate",
        str(model),
        "--prompts",
        "3",
        "--kinds",
        "one",
        "held_out_styles",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    table, report = capsys.readouterr().out, json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"]["one thing on a background, renders"]["right"] == 3
    assert report["rows"]["a thing in a held-out style, renders, style"]["right"] == 3
    assert report["rows"]["one thing on a background, best of 16"]["right"] == 0
    assert "one thing on a background, reconstructions" in report["decibels"]
    assert "from image embeddings, best of 16" in table
