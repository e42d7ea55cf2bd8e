"""ui/models.py: the models to choose from, and examples of what one knows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from clip_gen import ClipGen
from clip_gen.files import ROOT
from clip_gen.ui import models
from clip_gen.ui.models import BUNDLED, MAX_EXAMPLES, Models, examples, model_choices


def test_bundled_pulled_and_trained_models_are_listed(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("checkpoints/shapes", "checkpoints/coco", "checkpoints/mine", "trained/model"):
        shutil.copytree(tiny_model_folder, tmp_path / name)
    (tmp_path / "checkpoints/coco/training.json").write_text('{"imported": {}}')
    shutil.copytree(tiny_model_folder, tmp_path / "checkpoints/incomplete")
    (tmp_path / "checkpoints/incomplete/gpt.safetensors").unlink()
    monkeypatch.setattr(models, "checkpoints_folder", lambda: tmp_path / "checkpoints")
    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert model_choices() == [
        ("coco (pulled)", "checkpoints/coco"),
        ("mine (trained)", "checkpoints/mine"),
        ("shapes (bundled)", "checkpoints/shapes"),
        ("trained (trained)", "trained"),
    ]
    assert Models().get("trained").config.name == "tiny"


@pytest.mark.parametrize("name", BUNDLED)
def test_examples_have_only_words_that_the_model_knows(name: str) -> None:
    model = ClipGen.load(ROOT / "checkpoints" / name, "cpu")
    found = examples(model)
    assert 4 <= len(found) <= MAX_EXAMPLES
    for prompt in found:
        assert model.generate(prompt, candidates=1, num_outputs=1).warnings == []


def test_a_model_is_loaded_once_and_again_after_it_was_trained_again(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "mine")
    loaded = Models()
    first = loaded.get(str(folder))
    assert loaded.get(str(folder)) is first
    os.utime(folder / "gpt.safetensors", (2e9, 2e9))
    assert loaded.get(str(folder)) is not first
    with pytest.raises(ValueError, match="nowhere"):
        loaded.get("nowhere")


@pytest.mark.parametrize("name", BUNDLED)
def test_names_in_checkpoints_are_those_that_a_command_takes(name: str) -> None:
    assert (f"{name} (bundled)", f"checkpoints/{name}") in model_choices()
    assert (ROOT / f"checkpoints/{name}/config.yaml").is_file()
