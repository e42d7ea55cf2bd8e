"""default_model.py: which model predicts when a request names none."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from bad_server import bad_server
from importer_files import hfailab_files

from clip_gen.files import ROOT
from clip_gen.weights import default_model
from clip_gen.weights.default_model import BUNDLED, own_weights
from predict import Predictor


@pytest.fixture(autouse=True)
def _nothing_named_or_pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CLIP_GEN_MODEL", raising=False)
    monkeypatch.setattr(default_model, "COCO", tmp_path / "coco")


def test_the_bundled_model_predicts_where_there_is_no_other() -> None:
    assert ROOT / "checkpoints" / "shapes" == BUNDLED
    source, reason = own_weights()
    assert source == str(BUNDLED)
    assert "plain shapes only" in reason


def test_the_coco_model_goes_before_the_bundled_one_where_it_is_there(tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "coco")
    assert own_weights() == (str(tmp_path / "coco"), "it was pulled")


@pytest.mark.parametrize(
    ("named", "source"),
    [
        ("checkpoints/mine", str(ROOT / "checkpoints" / "mine")),
        ("/models/mine.tar", "/models/mine.tar"),
        ("https://example.com/mine.tar", "https://example.com/mine.tar"),
        ("~/mine.tar", str(Path.home() / "mine.tar")),
    ],
)
def test_what_cog_yaml_names_goes_before_both(
    named: str, source: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "coco")
    monkeypatch.setenv("CLIP_GEN_MODEL", named)
    assert own_weights() == (source, "CLIP_GEN_MODEL names it")


def test_cog_weights_goes_before_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_MODEL", "checkpoints/mine")
    assert own_weights("other.tar") == ("other.tar", "COG_WEIGHTS names it")


def test_coco_is_pulled_at_the_first_start_and_a_failure_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{path.stem}_coco.pt": path.read_bytes() for path in hfailab_files(tmp_path).glob("*.pt")}
    monkeypatch.setenv("CLIP_GEN_MODEL", "coco")
    monkeypatch.setenv("PATH", "/nowhere")  # no pget
    with bad_server(files) as server:
        monkeypatch.setenv("CLIP_GEN_MIRROR", server.address)
        with pytest.raises(ValueError, match=r"ViT-B-32\.pt: the server answers 404"):
            asyncio.run(Predictor().setup(None))
    assert not (tmp_path / "coco").exists()
    assert [path.rpartition("/")[2] for path, _ in server.asked] == ["vqgan_coco.pt", "gpt_coco.pt", "ViT-B-32.pt"]


def test_the_log_says_which_model_and_why(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "coco")
    asyncio.run(Predictor().setup(None))
    assert f"model: tiny from {tmp_path / 'coco'} on cpu: it was pulled" in capsys.readouterr().out
