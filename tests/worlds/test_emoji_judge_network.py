"""worlds/emoji/judge_network.py: learns names from other artists' drawings, and reads pictures beside the templates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_gen.worlds.emoji import judge_network
from clip_gen.worlds.emoji.drawings import drawing
from clip_gen.worlds.emoji.judge import read
from clip_gen.worlds.emoji.judge_network import NameNetwork, read_drawings, renamed, train, varied
from clip_gen.worlds.emoji.rendering import render
from clip_gen.worlds.emoji.scenes import Item, Scene
from clip_gen.worlds.emoji.words import things

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
