"""__main__.py and generate.py: the command line."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from clip_gen import generate, pipeline
from clip_gen.__main__ import COMMANDS, main
from clip_gen.sampling.sampler import Sampling
from clip_gen.training import cli
from predict import INPUTS


def test_generate_writes_numbered_pictures_with_their_settings(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "a red circle", "--model", str(tiny_model_folder), "--out", str(tmp_path / "new" / "folder")]
    assert main([*words, "--seed", "3", "--num-outputs", "2", "--top-p", "0.9"]) == 0
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["0.png", "1.png"]
    text = Image.open(tmp_path / "new" / "folder" / "0.png").text
    assert (text["prompt"], text["seed"], text["top_p"]) == ("a red circle", "3", "0.9")
    assert text["score"] in capsys.readouterr().out


def test_a_preset_sets_the_options_that_are_not_given(tiny_model_folder: Path, tmp_path: Path) -> None:
    words = ["generate", "a cat", "--model", str(tiny_model_folder), "--out", str(tmp_path), "--preset", "coco"]
    assert main([*words, "--candidates", "3", "--num-outputs", "1"]) == 0
    text = Image.open(tmp_path / "0.png").text
    assert (text["candidates"], text["num_outputs"], text["top_k"], text["top_p"]) == ("3", "1", "500", "0.95")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "a", "--model", "nowhere"], "generate: nowhere: no such file or folder; give"),
        (["generate", " "], "generate: prompt is ' '"),
        (["generate", "caf\udce9"], "generate: prompt is 'caf\\udce9', which is not UTF-8 text"),
        (["generate", "a", "--num-outputs", "17"], "generate: num_outputs is 17, more than the 16 candidates"),
        (["generate", "a", "--top-p", "1.5"], "generate: top_p is 1.5; give a number, 0 to 1"),
        (["generate", "a", "--out", f"{__file__}/x"], f"generate: {__file__}/x: cannot be used (Not a directory)"),
        (["generate", "a", "--out", "/proc/x"], "generate: /proc/x: cannot be used (No such file or directory)"),
        (["evaluate", "nowhere", "--prompts", "0"], "evaluate: prompts is 0; give 1 or more"),
        (
            ["generate", "a", "--output-quality", "101"],
            "generate: output_quality is 101; give a whole number, 0 to 100",
        ),
        (["generate", "a", "--out", __file__], f"generate: {__file__}: cannot be used (Not a directory); name"),
        (["evaluate", "nowhere"], "evaluate: nowhere: no such file or folder; give a model folder"),
        (["train-shapes", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["shapes", "--count", "0", "--out", "x"], "0"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_networks", None)  # what is wrong is said before a model is loaded
    assert main(words) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_a_broken_link_as_folder_is_refused_before_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_networks", None)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["generate", "a", "--out", str(tmp_path / "link")]) == 1
    error = f"generate: {tmp_path}/link: cannot be used (No such file or directory); name another folder\n"
    assert capsys.readouterr().err == error


def test_generate_replaces_pictures_only_with_overwrite(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "a star", "--model", str(tiny_model_folder), "--out", str(tmp_path), "--candidates", "4"]
    (tmp_path / "1.png").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load_networks", None)
        assert main(words) == 1
    said = capsys.readouterr().err
    assert said == f"generate: {tmp_path}/1.png exists already; give --overwrite, or name another folder with --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["1.png"]
    assert main([*words, "--output-format", "webp"]) == 0
    assert (tmp_path / "1.png").read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0
    assert Image.open(tmp_path / "1.png").size == (16, 16)


def test_generate_leaves_metadata_out_and_draws_one_of_identical_pictures(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["generate", "a star", "--model", str(tiny_model_folder), "--out", str(tmp_path), "--temperature", "0"]
    assert main([*words, "--no-output-metadata", "--output-quality", "50"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    assert Image.open(tmp_path / "0.png").text == {}
    assert "output_quality is 50, which does nothing: png is always lossless" in caplog.text
    assert "temperature is 0: all candidates would be the same picture" in caplog.text


def test_a_contact_sheet_is_written_beside_the_pictures(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "a star", "--model", str(tiny_model_folder), "--out", str(tmp_path), "--output-grid"]
    assert main([*words, "--output-format", "webp", "--name", "cat"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"cat.{i}.webp" for i in range(4)), "cat.grid.webp"]
    assert Image.open(tmp_path / "cat.grid.webp").size == (44, 44)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'cat.grid.webp'}\n")
    (tmp_path / "prompts.txt").write_text("a star")
    assert main(["generate", *words[2:], "--prompts-file", str(tmp_path / "prompts.txt"), "--temperature=0"]) == 0
    assert {"0001.0.png", "0001.grid.png"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "grid.png").touch()
    assert main(words) == 1
    assert "grid.png exists already" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--" in capsys.readouterr().out


def test_generate_has_the_settings_and_defaults_of_predict() -> None:
    assert {name: INPUTS[name].info.default for name in generate.DEFAULTS} == generate.DEFAULTS
    assert {field.name for field in fields(Sampling)} < generate.DEFAULTS.keys()


def test_the_help_of_generate_has_the_ranges_of_predict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, field in INPUTS.items():
        if field.info.le is not None and name not in ("num_outputs", "top_k"):
            assert re.search(rf"--{name.replace('_', '-')} [^-]*{field.info.ge} to {field.info.le}", said)


def test_every_setting_of_a_training_has_help() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert "1: all of it. Default: 1.0." in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("words", "out", "names", "sentence"),
    [
        ("evaluate MODEL --out OUT", "", ["report.json"], "holds report.json and is no evaluation folder of this"),
        ("evaluate MODEL --out OUT", "", ["sheet.png"], "holds sheet.png and is no evaluation folder of this"),
        (
            "train-shapes --work OUT --out OUT/model",
            "",
            ["clip/record.json"],
            "holds clip and is no train-shapes folder",
        ),
        (
            "train-shapes --work OUT/work --out OUT",
            "",
            ["gpt/settings.json"],
            "holds gpt and is no model folder",
        ),
        ("train-shapes --work OUT/work --out OUT", "", ["config.yaml"], "holds config.yaml and is no model folder"),
        ("shapes --count 1 --out OUT", "", ["notes.txt"], "has files in it already; name a new or empty folder"),
        ("shapes --count 1 --out OUT --zip", ".zip", [], "OUT.zip exists already"),
        ("pull lpips --out OUT", "", ["lpips.safetensors"], "holds lpips.safetensors and is no LPIPS folder of this"),
    ],
)
def test_no_command_replaces_files_of_the_user(
    words: str, out: str, names: list[str], sentence: str, tiny_model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in names or [""]:
        path = tmp_path / f"OUT{out}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    words = words.replace("OUT", str(tmp_path / "OUT")).replace("MODEL", str(tiny_model_folder))
    assert main(words.split()) == 1
    assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() == "{}" for path in before if path.is_file())


@pytest.mark.parametrize(
    "words",
    [
        "evaluate MODEL --out",
        "train-shapes --out OUT/model --work",
        "train-shapes --work OUT/work --out",
        "shapes --count 1 --out",
        "shapes --count 1 --zip --out",
        "pull coco --out",
        "train nowhere.zip --base MODEL --out",
    ],
)
def test_a_folder_that_cannot_be_written_to_gives_one_error_sentence(
    words: str, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    words = words.replace("OUT", str(tmp_path / "OUT")).replace("MODEL", str(tiny_model_folder))
    for place in (tmp_path / "file" / "x", tmp_path / "link" / "x", Path("/proc/x/y")):
        assert main([*words.split(), str(place)]) == 1
        error = capsys.readouterr().err
        assert "name another folder" in error or "name a new" in error, error
        assert "Errno" not in error
        assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
