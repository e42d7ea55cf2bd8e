"""`pip install .`: the package alone has its commands and recipes, and says how to get a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from clip_gen.files import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, as pip leaves it in site-packages."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "clip_gen", source / "clip_gen", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options, str(source)], check=True)
    [wheel] = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(wheels / "site")
    return wheels / "site"


COMMANDS = """
import contextlib, io, json, sys
from clip_gen.__main__ import main

sys.argv[0] = "clip-gen"
ended = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code
    ended.append((status, out.getvalue(), errors.getvalue()))
print(json.dumps(ended))
"""


def run(installed: Path, folder: Path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Status, output and errors of console commands, run in `folder` with their data folder there.

    One process runs them all, since it takes seconds to start.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CLIP_GEN_", "COG_"))}
    environment |= {"PYTHONPATH": str(installed), "XDG_DATA_HOME": str(folder)}
    command = [sys.executable, "-P", "-c", COMMANDS, json.dumps(commands)]
    return json.loads(subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def test_the_package_has_the_recipes_and_the_command_but_no_model(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    files = ("drawings.zip", "words.yaml", "held_out.yaml", "synonyms.json", "related_nouns.json", "LICENSES.md")
    world = [f"worlds/emoji/{name}" for name in files]
    for name in ("configs/shapes.yaml", "configs/emoji.yaml", "ui/page.css", *world):
        assert f"clip_gen/{name}" in names
    weights = {name for name in names if name.endswith(".safetensors")}
    assert weights == {"clip_gen/worlds/emoji/judge_network.safetensors"}
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"clip_gen"}
    [entry_points] = installed.glob("*.dist-info/entry_points.txt")
    assert "clip-gen = clip_gen.__main__:main" in entry_points.read_text()


def test_installed_commands_list_settings_draw_and_say_how_to_get_a_model(
    installed: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    drawing = ["generate", "a red circle", "--model", str(tiny_model_folder), "--seed", "3"]
    without, listed, drawn = run(installed, tmp_path, ["generate", "a red circle"], ["train", "--help"], drawing)
    status, _, errors = without
    assert status == 1
    assert errors.splitlines()[-1].startswith("generate: no model is installed: `clip-gen pull coco` downloads")
    status, output, errors = listed
    assert status == 0, errors
    assert output.startswith("usage: clip-gen train")
    assert "--max-minutes" in output
    status, _, errors = drawn
    assert status == 0, errors
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_other_systems_are_refused_with_a_sentence() -> None:
    code = "import sys; sys.platform = 'darwin'; import clip_gen"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "clip_gen runs on Linux only; on macOS use Docker" in ended.stderr.splitlines()[-1]
