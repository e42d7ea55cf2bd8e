"""weights/default_model.py: the model when a request names none."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from bad_server import bad_server
from importer_files import hfailab_files

from clip_gen.files import ROOT
from clip_gen.weights import default_model
from clip_gen.weights.default_model import BUNDLED
from predict import Predictor


@pytest.fixture(autouse=True)
def _checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty checkpoints/ beside the current folder; the bundled model stays where it is."""
    monkeypatch.setattr(default_model, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(default_model, "COCO", tmp_path / "coco")
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")


def test_the_bundled_model_is_used_if_there_is_no_other() -> None:
    assert ROOT / "checkpoints" / "emoji" == BUNDLED
    source, reason = default_model.default_model()
    assert source == str(BUNDLED)
    assert "emoji only" in reason


def test_a_pulled_coco_model_is_preferred_to_the_bundled_one(tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "coco")
    assert default_model.default_model() == (str(tmp_path / "coco"), "it was pulled")


@pytest.mark.parametrize("named", ["/models/mine.tar", "https://example.com/mine.tar", "other.tar", "~/mine.tar"])
def test_cog_weights_is_preferred_to_a_pulled_model(named: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "coco")
    assert default_model.default_model(named) == (named, "COG_WEIGHTS names it")


@pytest.mark.parametrize("named", ["mine", "checkpoints/mine", "coco", "checkpoints/coco"])
def test_cog_weights_may_name_a_folder_in_checkpoints(named: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / named.removeprefix("checkpoints/")
    shutil.copytree(tiny_model_folder, folder)
    assert default_model.default_model(named) == (str(folder), "COG_WEIGHTS names it")


def test_an_existing_path_is_preferred_to_a_name_in_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Path("mine").mkdir()
    assert default_model.find_weights("mine") == "mine"


def test_coco_is_pulled_at_the_first_start_or_fails_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{path.stem}_coco.pt": path.read_bytes() for path in hfailab_files(tmp_path).glob("*.pt")}
    with bad_server(files) as server:
        monkeypatch.setenv("CLIP_GEN_MIRROR", server.address)
        with pytest.raises(ValueError, match=r"ViT-B-32\.pt: the server answers 404"):
            asyncio.run(Predictor().setup("coco"))
    assert not (tmp_path / "coco").exists()
    assert [path.rpartition("/")[2] for path, _ in server.requests] == ["vqgan_coco.pt", "gpt_coco.pt", "ViT-B-32.pt"]


def test_the_log_says_which_model_and_why(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "coco")
    asyncio.run(Predictor().setup(None))
    assert f"model: tiny from {tmp_path / 'coco'} on cpu: it was pulled" in capsys.readouterr().out
