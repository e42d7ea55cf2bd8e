"""ui/history.py: drawings that are kept in a folder."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

import pytest
from PIL import Image

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.generate import DEFAULTS
from clip_gen.picture_files import drawing_settings
from clip_gen.pipeline import Stopped
from clip_gen.ui.history import Drawing, History, keep_input_pictures

SETTINGS = DEFAULTS | {"prompt": "a star", "seed": 3, "candidates": 4, "num_outputs": 2}


def add(history: History, model: ClipGen, **changed: object) -> Drawing:
    with history.new_folder() as folder:
        settings = keep_input_pictures(SETTINGS | changed, folder, model.config.vqgan.resolution)
        result = model.generate(**drawing_settings(settings))
        return history.add(folder, model, "checkpoints/tiny", result, settings, lambda: False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A large photograph, not square, with its device in the EXIF."""
    exif = Image.Exif()
    exif[0x010F] = "SecretCam"
    Image.radial_gradient("L").resize((300, 200)).convert("RGB").save(tmp_path / "alice.jpg", exif=exif)
    return tmp_path / "alice.jpg"


def test_drawings_are_found_again_newest_first(tiny_model: ClipGen, tmp_path: Path) -> None:
    first = add(History(tmp_path), tiny_model)
    second = add(History(tmp_path), tiny_model, prompt="", image=first.pictures[0], output_grid=True)
    found = History(tmp_path).drawings()
    assert [drawing.name for drawing in found] == sorted([first.name, second.name], reverse=True)
    again = {drawing.name: drawing for drawing in found}
    assert again[first.name].settings == first.settings
    assert again[first.name].title == "a star"
    assert again[second.name].title == "variations of a picture"
    assert (again[first.name].sheet, again[second.name].sheet) == (None, second.folder / "grid.png")
    scores = first.settings["scores"]
    assert first.captions() == [f"{score:.3f} · seed 3" for score in scores]
    assert scores == sorted(scores, reverse=True)


def test_incomplete_and_foreign_folders_are_left_out_and_left_alone(tiny_model: ClipGen, tmp_path: Path) -> None:
    history = History(tmp_path / "drawings")
    assert history.drawings() == []
    whole, without = add(history, tiny_model), add(history, tiny_model)
    without.pictures[1].unlink()
    (tmp_path / "drawings" / "mine").mkdir()
    (tmp_path / "drawings" / "20260101-000000-abcdef").mkdir()
    (tmp_path / "secret").mkdir()
    assert [drawing.name for drawing in history.drawings()] == [whole.name]
    for name in ("mine", "../secret", "", None):
        assert history.find(name) is None
    history.remove("../secret")
    history.remove("mine")
    history.remove(whole.name)
    assert history.drawings() == []
    assert (tmp_path / "secret").is_dir()
    assert (tmp_path / "drawings" / "mine").is_dir()


def test_a_failed_drawing_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with History(tmp_path).new_folder() as folder:
            (folder / "mask.png").touch()
            raise Stopped

    with pytest.raises(Stopped):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_kept_input_pictures_draw_the_same_as_the_originals_and_hold_nothing_else(
    photo: Path, tiny_model: ClipGen, tmp_path: Path
) -> None:
    mask = tmp_path / "mask.png"
    Image.linear_gradient("L").resize((300, 200)).save(mask)
    pictures = {"image": photo, "init_image": photo, "mask": mask}
    wanted = tiny_model.generate(**drawing_settings(SETTINGS | pictures))
    drawing = add(History(tmp_path / "drawings"), tiny_model, **pictures)
    assert [Image.open(path).tobytes() for path in drawing.pictures] == [one.tobytes() for one in wanted.images]
    for name in pictures:
        kept = drawing.input_picture(name)
        assert Image.open(kept).size == (16, 16)
        assert drawing.settings[f"{name}_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    written = b"".join(path.read_bytes() for path in drawing.folder.iterdir())
    assert not [word for word in (b"Secret", b"alice", str(tmp_path).encode()) if word in written]


def test_the_command_draws_the_same_pictures_again(
    tiny_model: ClipGen, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = add(History(tmp_path / "drawings"), tiny_model, guidance=2.0, output_format="webp")
    dtype, python, *command = shlex.split(drawing.settings["command"])
    assert (python, command[:2]) == ("python", ["-m", "clip_gen"])
    monkeypatch.setenv(*dtype.split("="))
    words = [word.replace("checkpoints/tiny", str(tiny_model_folder)) for word in command[2:]]
    assert main([words[0], f"--out={tmp_path / 'again'}", *words[1:]]) == 0
    for path in drawing.pictures:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
