"""script/predict: inputs, files and error messages."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cog_server import nameless_user
from model_files import other_folder, slow_folder
from PIL import Image
from scripts import run_script

from clip_gen.files import ROOT
from clip_gen.images import save_image
from clip_gen.pipeline import ClipGen
from clip_gen.serving import cli
from clip_gen.weights.model_folder import load_config
from clip_gen.weights.tarball import pack

QUICK = ["-i", "prompt=a large red circle", "-i", "seed=7", "-i", "candidates=4"]
SCRIPT = str(ROOT / "script" / "predict")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> Path:
    """An empty current folder, with the toy model for COG_WEIGHTS."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("COG_WEIGHTS", str(tiny_model_folder))
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    return here


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def main(arguments: Sequence[str]) -> int:
    return run_script("predict", arguments)


Refuse = Callable[..., str]


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs it, checks that it exits with 1 and writes nothing, and returns its error message."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert files(folder) == []
        return said.err

    return run


def test_pictures_are_named_as_by_cog_predict(folder: Path) -> None:
    assert main(QUICK) == 0
    assert files(folder) == [f"output.{i}.png" for i in range(4)]
    assert {Image.open(path).size for path in folder.iterdir()} == {(16, 16)}
    text = Image.open("output.0.png").text
    assert (text["prompt"], text["seed"], text["candidates"], text["model"]) == ("a large red circle", "7", "4", "tiny")


def test_each_file_is_printed_with_its_score_best_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "-i", "num_outputs=3"])
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split("  score ")[1]) for line in lines[:3]]
    assert [line.split("  ")[0] for line in lines[:3]] == files(folder)
    assert scores == sorted(scores, reverse=True)
    assert re.fullmatch(r"seed 7, model tiny, [\d.]+ seconds", lines[3])


def test_the_printed_seed_gives_the_same_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-i", "prompt=a star", "-i", "candidates=4", "-o", "first"])
    seed = re.search(r"^seed (\d+),", capsys.readouterr().out, re.MULTILINE).group(1)
    main(["-i", "prompt=a star", "-i", "candidates=4", "-o", "again", "-i", f"seed={seed}"])
    for i in range(4):
        assert Image.open(f"first.{i}.png").tobytes() == Image.open(f"again.{i}.png").tobytes()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("cat", "cat.0.png"),
        ("cat.png", "cat.0.png"),
        ("sub/cat.webp", "sub/cat.0.webp"),
        ("sub", "sub/output.0.png"),
        ("v1.2", "v1.2.0.png"),
        ("cat.JPEG", "cat.0.jpg"),
    ],
)
def test_the_output_option_names_files_folder_and_format(folder: Path, output: str, expected: str) -> None:
    (folder / "sub").mkdir()
    assert main([*QUICK, "-i", "num_outputs=1", "-o", output]) == 0
    written = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert written == [expected]
    assert Image.open(expected).format.lower() == {"jpg": "jpeg"}.get(expected[-3:], expected.rpartition(".")[2])


def test_an_output_suffix_that_contradicts_the_format_is_refused(refused: Refuse) -> None:
    said = refused(*QUICK, "-o", "cat.jpg", "-i", "output_format=png")
    assert said == "-o cat.jpg asks for jpg, but output_format is png\n"


def test_an_output_folder_that_is_missing_is_created(folder: Path) -> None:
    assert main([*QUICK, "-i", "num_outputs=1", "-o", "new/cat"]) == 0
    assert main([*QUICK, "-i", "num_outputs=1", "-o", "other/"]) == 0
    assert (folder / "new" / "cat.0.png").is_file()
    assert (folder / "other" / "output.0.png").is_file()


def no_loading(*_: object) -> None:
    raise AssertionError("loaded a model")


def test_a_folder_with_the_name_of_a_picture_is_refused_before_loading(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClipGen, "load", no_loading)
    (folder / "output.2.png").mkdir()
    assert main(QUICK) == 1
    assert (
        capsys.readouterr().err
        == "generate: output.2.png exists already and is not a plain file; move it, or choose another folder or name\n"
    )
    assert files(folder) == ["output.2.png"]


def test_an_unwritable_folder_is_refused_before_loading(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClipGen, "load", no_loading)
    assert main([*QUICK, "-o", "/proc/output"]) == 1
    assert "generate: /proc: cannot be used (No such file or directory); name another folder" in capsys.readouterr().err


def test_pictures_that_cannot_all_be_written_leave_the_folder_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(image: Image.Image, path: Path, *settings: object) -> None:
        if path.name == "output.2.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_image(image, path, *settings)

    (folder / "output.1.png").write_text("earlier")
    monkeypatch.setattr("clip_gen.picture_files.save_image", save)
    assert main(QUICK) == 1
    assert capsys.readouterr().err.endswith("generate: .: cannot be written to (No space left on device)\n")
    assert files(folder) == ["output.1.png"]
    assert (folder / "output.1.png").read_text() == "earlier"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*QUICK, "-i", "num_outputs=5"], "num_outputs is 5, more than the 4 candidates"),
        (["-i", "prompt=   "], "prompt is '   ', without a letter, a digit or an emoji; say what to draw"),
    ],
)
def test_invalid_settings_are_refused_before_the_model_is_loaded(
    refused: Refuse, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClipGen, "load", no_loading)
    assert sentence in refused(*arguments)


def test_identical_candidates_make_one_file_and_metadata_can_be_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*QUICK, "-i", "temperature=0", "-i", "output_metadata=false"]) == 0
    assert files(folder) == ["output.0.png"]
    assert Image.open("output.0.png").text == {}
    assert "temperature is 0: all candidates would be the same picture" in caplog.text


def test_existing_pictures_are_replaced(folder: Path) -> None:
    (folder / "output.1.png").write_text("earlier")
    assert main(QUICK) == 0
    assert Image.open("output.1.png").size == (16, 16)
    assert files(folder) == [f"output.{i}.png" for i in range(4)]


def test_all_invalid_inputs_are_listed_with_value_and_remedy(refused: Refuse) -> None:
    said = refused(
        *("-i", "promt=a star", "-i", "num_outputs=99", "-i", "top_k=-1", "-i", "guidance=much", "-i", "seed=2.5"),
        *("-i", "clip_rerank=yes", "-i", "output_format=gif", "-i", "temperature=nan", "-i", "sed=1"),
    )
    assert said.splitlines() == [
        'unknown input "promt"; did you mean "prompt"?',
        'unknown input "sed"; did you mean "seed"?',
        "num_outputs is 99; give a whole number, 1 to 64",
        'clip_rerank is "yes"; give true or false',
        "top_k is -1; give a whole number, 0 to 16384",
        "temperature is nan; give a number, 0 to 10",
        'guidance is "much"; give a number, 0 to 20',
        "seed is 2.5; give a whole number, 0 to 2147483647",
        'output_format is "gif"; give one of png, webp, jpg',
    ]


def test_an_unknown_name_without_a_similar_one_lists_all_inputs(refused: Refuse) -> None:
    for name in ("zzz", "fields"):
        assert f'unknown input "{name}"; the inputs are prompt, image, image_weight,' in refused(
            *QUICK, "-i", f"{name}=1"
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-i", "prompt"], "-i prompt: write it as name=value"),
        (["-e", "=1"], "-e =1: write it as name=value"),
        (["-i", "prompt=a", "-i", "prompt=b"], "prompt is given twice; give it once"),
        (
            ["-i", "images=a", "-i", "images=b"],
            "images is given twice; give it once, with a text file of several paths",
        ),
        (["-i", "prompt=@absent.txt"], "prompt: absent.txt cannot be read (No such file or directory)"),
        ([*QUICK, "-i", "replicate_weights=@/dev/null"], "/dev/null: no such file or folder; give"),
        (["-i", "prompt=\udcff\udcfe"], "which is not UTF-8 text; use a terminal or file in UTF-8"),
        (["-i", "prompt=@../no_text"], "prompt: ../no_text cannot be read ('utf-8' codec"),
        (["-i", "prompt=@~nobody-here/a"], "prompt: ~nobody-here/a cannot be read (No such file or directory)"),
        ([*QUICK, "-o", ""], "-o is empty; give a name or a folder"),
        ([*QUICK, "-o", "cat.gif"], "-o cat.gif: .gif is not supported; give .png, .webp or .jpg"),
        ([*QUICK, "-e", "COG_WEIGHTS=absent"], "absent"),
        ([*QUICK, "-i", "replicate_weights=absent.tar"], "absent.tar"),
    ],
)
def test_unusable_values_are_refused_with_a_sentence(refused: Refuse, arguments: list[str], sentence: str) -> None:
    Path("../no_text").write_bytes(bytes(range(256)))
    assert sentence in refused(*arguments)


def test_optional_inputs_may_be_empty_and_booleans_capitalised(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["prompt=a star", "candidates=4", "seed=", "replicate_weights=", "clip_rerank=True"]
    assert main([word for one in given for word in ("-i", one)]) == 0
    assert "model tiny" in capsys.readouterr().out


def test_an_unknown_option_exits_with_2_as_in_all_commands(folder: Path) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main("predict", ["--prompt", "a star"])
    assert exit.value.code == 2


def test_help_lists_every_input_with_its_limits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main("predict", ["--help"])
    assert exit.value.code == 0
    assert re.search(r"num_outputs .*1 to 64; default 4", capsys.readouterr().out)


def test_a_prompt_can_come_from_a_file(folder: Path) -> None:
    (folder / "wish.txt").write_text("a large red circle\n")
    main([*QUICK, "-o", "typed"])
    main(["-i", "prompt=@wish.txt", *QUICK[2:], "-o", "read"])
    assert (folder / "typed.0.png").read_bytes() == (folder / "read.0.png").read_bytes()


def test_quotes_around_a_value_are_removed_as_cog_does(folder: Path) -> None:
    main([*QUICK, "-o", "plain"])
    main(["-i", 'prompt="a large red circle"', *QUICK[2:], "-o", "quoted"])
    assert (folder / "plain.0.png").read_bytes() == (folder / "quoted.0.png").read_bytes()


def test_an_environment_variable_chooses_the_model(folder: Path, tmp_path: Path) -> None:
    other = other_folder(tmp_path / "other")
    main([*QUICK, "-o", "own"])
    main([*QUICK, "-o", "other", "-e", f"COG_WEIGHTS={other}"])
    assert Image.open("own.0.png").tobytes() != Image.open("other.0.png").tobytes()


def test_the_default_model_is_not_loaded_when_the_request_names_another(folder: Path, tmp_path: Path) -> None:
    other = other_folder(tmp_path / "other")
    assert main([*QUICK, "-e", "COG_WEIGHTS=absent", "-i", f"replicate_weights={other}"]) == 0


@pytest.mark.parametrize("mark", ["", "@"])
def test_a_weights_tar_draws_the_same_as_its_folder(
    folder: Path, tmp_path: Path, mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pack(other_folder(tmp_path / "other"), tar := tmp_path / "other.tar")
    main([*QUICK, "-o", "folder", "-e", f"COG_WEIGHTS={tmp_path / 'other'}"])
    main([*QUICK, "-o", "tar", "-i", f"replicate_weights={mark}{tar}"])
    name = load_config(tmp_path / "other").name
    assert f"model: {name} from {tar} on cpu: the command names it" in caplog.text
    assert Image.open("folder.0.png").tobytes() == Image.open("tar.0.png").tobytes()


def test_the_script_writes_to_the_current_folder_and_imports_nothing_from_it(folder: Path) -> None:
    (folder / "clip_gen").mkdir()
    for decoy in ("predict.py", "clip_gen/__init__.py"):
        (folder / decoy).write_text("raise SystemExit('the wrong file')")
    run = subprocess.run([SCRIPT, *QUICK], capture_output=True, text=True, check=True)
    assert {f"output.{i}.png" for i in range(4)} < set(files(folder))
    assert run.stdout.count("score") == 4


def test_a_user_without_name_and_home_can_draw(folder: Path) -> None:
    folder.chmod(0o777)
    environment = {**os.environ, "HOME": "/", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*nameless_user(), SCRIPT, *QUICK], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {f"output.{i}.png" for i in range(4)} < set(files(folder))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_without_output_and_files(folder: Path, tmp_path: Path) -> None:
    (scratch := tmp_path / "scratch").mkdir()
    environment = {**os.environ, "COG_WEIGHTS": str(slow_folder(tmp_path / "slow")), "TMPDIR": str(scratch)}
    command = [SCRIPT, "-i", "prompt=a star", "-i", "candidates=256", "-i", "guidance=2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("model: slow")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    assert files(folder) == files(scratch) == []
