"""`pip install .`: the package alone has its commands and recipes, and says how to get a model."""

from __future__ import annotations

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


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The console command, run in `folder` with its data folder there."""
    code = "import sys; from clip_gen.__main__ import main; sys.argv[0] = 'clip-gen'; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CLIP_GEN_", "COG_"))}
    environment |= {"PYTHONPATH": str(installed), "XDG_DATA_HOME": str(folder)}
    command = [sys.executable, "-P", "-c", code, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_package_has_the_recipes_and_the_command_but_no_model(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert "clip_gen/configs/shapes.yaml" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"clip_gen"}
    [entry_points] = installed.glob("*.dist-info/entry_points.txt")
    assert "clip-gen = clip_gen.__main__:main" in entry_points.read_text()


def test_without_a_model_the_command_says_how_to_get_one(installed: Path, tmp_path: Path) -> None:
    ended = run(installed, tmp_path, "generate", "a red circle")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("generate: no model is installed: `clip-gen pull coco` downloads")


def test_the_installed_command_lists_the_settings_of_a_training(installed: Path, tmp_path: Path) -> None:
    ended = run(installed, tmp_path, "train", "--help")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: clip-gen train")
    assert "--max-minutes" in ended.stdout


def test_the_installed_command_draws_with_a_named_model(
    installed: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    ended = run(installed, tmp_path, "generate", "a red circle", "--model", str(tiny_model_folder), "--seed", "3")
    assert ended.returncode == 0, ended.stderr
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_other_systems_are_refused_with_a_sentence() -> None:
    code = "import sys; sys.platform = 'darwin'; import clip_gen"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "clip_gen runs on Linux only; on macOS use Docker" in ended.stderr.splitlines()[-1]
