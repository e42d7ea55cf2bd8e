"""worlds/shapes/folder.py: pictures, captions and zips of a seed; existing files are never replaced."""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_gen.worlds.shapes.folder import add_arguments, main, write_pictures
from clip_gen.worlds.shapes.judge import read
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import HELD_OUT, sample_scene


def write(out: Path, **changes: object) -> Path:
    options = {
        "count": 5,
        "seed": 3,
        "resolution": 64,
        "captions": False,
        "zipped": False,
        "held_out": "never",
        **changes,
    }
    return write_pictures(out=out, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def zipped_files(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_pictures_are_numbered_pngs_of_the_given_resolution(tmp_path):
    write(tmp_path / "out", resolution=48)
    assert list(files(tmp_path / "out")) == ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png"]
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (48, 48))


def test_picture_i_depends_only_on_the_seed_and_i(tmp_path):
    write(tmp_path / "few", count=3)
    write(tmp_path / "many", count=7)
    few, many = files(tmp_path / "few"), files(tmp_path / "many")
    assert few == {name: many[name] for name in few}
    picture = Image.open(io.BytesIO(many["00006.png"]))
    assert np.array_equal(picture, render(sample_scene(np.random.default_rng([3, 6])), 64))


def test_another_seed_gives_other_pictures(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "other", seed=4)
    assert not set(files(tmp_path / "one").values()) & set(files(tmp_path / "other").values())


def test_captions_and_attributes_fit_the_pictures(tmp_path):
    write(tmp_path / "out", count=20, captions=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"{i:05d}.png" for i in range(20)]
    for line in lines:
        reading = read(np.asarray(Image.open(tmp_path / "out" / line["file"])))
        stated = {(item["shape"], item["colour"], item["size"]) for item in line["items"]}
        assert {(item.shape, item.colour, item.size) for item in reading.items} == stated
        assert line["background"] == reading.background
        first = line["items"][0]
        opening = f"a {first['size']} {first['colour']} {first['shape']} {line['relation'] or 'on a'} "
        assert line["caption"].startswith(opening)
        assert line["caption"].endswith(f" on a {line['background']} background")


def test_without_captions_there_are_only_pictures(tmp_path):
    write(tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png"}


def test_a_zip_has_the_same_pictures_and_no_other_files(tmp_path):
    write(tmp_path / "folder")
    zipped = write(tmp_path / "new" / "pictures.zip", zipped=True)
    assert zipped_files(zipped) == files(tmp_path / "folder")
    assert [path.name for path in zipped.parent.iterdir()] == ["pictures.zip"]


def test_a_zip_gets_its_ending_and_the_same_bytes_for_a_seed(tmp_path):
    one, other = write(tmp_path / "v1.0", zipped=True), write(tmp_path / "again.ZIP", zipped=True)
    assert (one.name, other.name) == ("v1.0.zip", "again.ZIP")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_held_out_pairs_are_written_only_on_request(tmp_path, zipped):
    def pairs(held_out: str) -> set[tuple[str, str]]:
        out = write(tmp_path / held_out, count=40, held_out=held_out, zipped=zipped)
        pictures = (zipped_files(out) if zipped else files(out)).values()
        readings = [read(np.asarray(Image.open(io.BytesIO(picture)))) for picture in pictures]
        return {(item.colour, item.shape) for reading in readings for item in reading.items}

    assert not pairs("never") & HELD_OUT
    assert pairs("only") == HELD_OUT


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 0}, "count is 0; give a whole number, 1 or more"),
        ({"count": -2}, "count is -2; give a whole number, 1 or more"),
        ({"seed": -1}, "seed is -1; give a whole number, 0 or more"),
        ({"resolution": 4}, "resolution is 4; give a whole number, 16 to 4096"),
        ({"resolution": 100_000}, "resolution is 100000; give a whole number, 16 to 4096"),
        ({"captions": True, "zipped": True}, "a zip has no captions; leave out"),
    ],
)
def test_invalid_values_are_refused_with_value_and_remedy(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        write(tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_refused_and_does_not_change(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"beach")
    with pytest.raises(ValueError, match=f"{tmp_path} has files in it already; name a new or empty folder"):
        write(tmp_path)
    assert files(tmp_path) == {"holiday.jpg": b"beach"}


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("notes")
    with pytest.raises(ValueError, match=r"out: cannot be used \(Not a directory\); name another folder"):
        write(tmp_path / "out")


def test_an_existing_zip_is_not_replaced(tmp_path):
    (tmp_path / "out.zip").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"out\.zip exists already; name another file"):
        write(tmp_path / "out", zipped=True)
    assert files(tmp_path) == {"out.zip": b"precious"}


def test_a_zip_that_fails_leaves_no_files(tmp_path):
    with pytest.raises(ValueError, match="sometimes"):
        write(tmp_path / "out.zip", zipped=True, held_out="sometimes")
    assert not list(tmp_path.iterdir())


def test_the_command_follows_its_options(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    main(parser.parse_args(["--count", "2", "--seed", "9", "--out", str(tmp_path / "a"), "--captions"]))
    assert list(files(tmp_path / "a")) == ["00000.png", "00001.png", "captions.jsonl"]
    main(parser.parse_args(["--count", "2", "--out", str(tmp_path / "b"), "--zip", "--resolution", "96"]))
    write(tmp_path / "c", count=2, seed=0, resolution=96)
    assert zipped_files(tmp_path / "b.zip") == files(tmp_path / "c")
