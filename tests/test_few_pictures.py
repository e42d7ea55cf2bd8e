"""benchmarks/few_pictures.py with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.__main__ import main
from benchmarks.few_pictures import divided, named, prompt_of, thing_of, train_classifier
from clip_gen.worlds.emoji.rendering import sprite
from clip_gen.worlds.emoji.scenes import Item
from clip_gen.worlds.emoji.words import things


def write_pictures(folder: Path, colour: tuple[int, int, int]) -> Path:
    """Twelve drawings in shades of a colour on white, NAME.png each."""
    folder.mkdir(parents=True)
    for i, name in enumerate(list(things())[:12]):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[4 + i : 20 + i, 6:26] = np.uint8(np.array(colour) * (0.6 + 0.03 * i))
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def test_the_benchmark_trains_draws_and_judges(tiny_model_folder: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "others" / "new", (220, 30, 30))
    for name, colour in (("blue", (30, 30, 220)), ("green", (30, 200, 30))):
        write_pictures(tmp_path / "others" / name, colour)
    words = ["--others", str(tmp_path / "others"), "--out", str(tmp_path / "out"), "--learn", "9", "--draw", "3"]
    more = ["--minutes", "0.02", "--classifier-steps", "12"]
    main(["few-pictures", str(tiny_model_folder), str(pictures), *words, *more])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["learnt"], result["drawn"]) == (9, 3)
    shares = ("accepted", "accepted_before", "accepted_of_pictures", "others_refused", "named", "named_before", "close")
    assert all(0 <= result[name] <= 1 for name in shares)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size == (3 * 16, 3 * 16)


def test_the_classifier_tells_kinds_apart() -> None:
    torch.manual_seed(0)
    red, blue = torch.full((6, 3, 64, 64), -0.5), torch.full((6, 3, 64, 64), -0.5)
    red[:, 0, 20:40, 20:40], blue[:, 2, 20:40, 20:40] = 0.9, 0.9
    network = train_classifier([red, blue], 12, seed=0)
    assert network(torch.cat([red, blue]) + 0.02).argmax(dim=1).tolist() == [0] * 6 + [1] * 6


def test_drawn_things_are_named_by_the_network_of_the_emoji_world() -> None:
    names = list(things())[:20]
    sprites = np.stack([sprite(Item(name, "3d"), 64, 1) for name in names]) / np.float32(255)
    white = np.full((len(names), 128, 128, 3), 255, np.uint8)
    white[:, 40:104, 10:74] = 255 * (sprites[..., :3] + 1 - sprites[..., 3:])  # anywhere on the picture
    assert named(torch.from_numpy(white), names) > 0.7
    assert named(torch.from_numpy(white), names[1:] + names[:1]) < 0.2
    assert named(torch.from_numpy(white), ["no such thing"] * len(names)) is None
    assert thing_of(white[0]).shape == thing_of(np.full((128, 128, 3), 9, np.uint8)).shape == (1, 3, 32, 32)


def test_prompts_and_the_pictures_to_learn(tmp_path: Path) -> None:
    assert prompt_of(tmp_path / "hot-air_balloon.png") == "a hot air balloon"
    (tmp_path / "cat.txt").write_text("a cat with a hat\nand more\n")
    assert prompt_of(tmp_path / "cat.png") == "a cat with a hat"
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    learnt, others = divided(paths, 3, seed=1)
    assert (len(learnt), sorted([*learnt, *others])) == (3, paths)
    with pytest.raises(ValueError, match="there are 5 pictures, and 5 are to be learnt; give fewer with --learn"):
        divided(paths, 5, seed=1)
