"""What is in the image: the files that predict and train need, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_files import copy_image_files, is_ignored

FILES = {"cog.yaml", "predict.py", "train.py"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_image_files(tmp_path_factory.mktemp("image") / "src")


@pytest.mark.parametrize(
    "path",
    [
        *("photos.zip", "trained_model.tar", "pictures/0.png", "trained/weights.tar", ".setup.lock", "output.0.png"),
        *(".git/config", ".venv/bin/python", "tests/conftest.py", "docs/sheet.webp", "deploy/compose.yaml", ".env"),
        *("clip_gen/__pycache__/files.cpython-311.pyc", "checkpoints/.pulling-coco/part", "checkpoints/.DS_Store"),
    ],
)
def test_files_that_predict_and_train_do_not_read_stay_out(path: str) -> None:
    assert is_ignored(path)


@pytest.mark.parametrize(
    "path",
    ["clip_gen/worlds/emoji/drawings.zip", "checkpoints/coco/gpt.safetensors", "checkpoints/mine.tar", "train.py"],
)
def test_the_package_and_all_models_stay_in(path: str) -> None:
    assert not is_ignored(path)


@pytest.mark.slow
def test_the_files_of_the_image_are_enough_to_train_and_draw(
    image: Path, photos: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """What docs/deploy.md runs with `cog exec`: the progress is printed, and the folder has weights and a report."""
    assert {path.name for path in image.iterdir()} == {"LICENSE", "checkpoints", "clip_gen", ".cog", *FILES}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COG_WEIGHTS": ""}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "clip_gen", *words]
        ended = subprocess.run(command, cwd=image, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stderr

    trained = tmp_path / "trained"
    quick = ["--vqgan-steps=2", "--transformer-steps=2", "--batch-size=4", "--adversarial-weight=0", "--no-crop"]
    said = run("train", str(photos), f"--out={trained}", f"--base={tiny_model_folder}", *quick)
    assert "24 usable pictures" in said
    assert "vqgan 2/2" in said
    assert {"weights.tar", "report.html"} <= {path.name for path in trained.iterdir()}
    run("generate", "a red circle", f"--out={tmp_path / 'drawn'}", "--candidates=4")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4
