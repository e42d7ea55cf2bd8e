"""training/base.py: base auto is the model that predicts if its CLIP knows the pictures, else published weights."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import BadServer, bad_server
from conftest import FIXTURES, TINY, picture_bytes
from importer_files import VIT, clip_state, taming_files
from nasty_zip import write_nasty_zip
from PIL import Image
from safetensors.torch import load_file

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.config import GPTConfig
from clip_gen.files import MODULE, ROOT
from clip_gen.training import base, plan
from clip_gen.training.datasets import PictureFiles
from clip_gen.training.expectation import dry_run
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings
from clip_gen.weights import download, pull
from clip_gen.weights.model_folder import Networks, load_networks
from clip_gen.worlds.emoji.drawings import drawing
from clip_gen.worlds.emoji.pairs import RenderedPictures as EmojiScenes
from clip_gen.worlds.emoji.words import things
from clip_gen.worlds.shapes.pairs import RenderedPictures

TOY = TrainSettings(
    vqgan_steps=2,
    transformer_steps=2,
    batch_size=4,
    precision="32-true",
    crop=False,
    flip=False,
    adversarial_weight=0.0,
)


@pytest.fixture(scope="module")
def shapes() -> Networks:
    return load_networks(ROOT / "checkpoints" / "shapes")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Cuttings of two photographs."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(24):
        with Image.open(FIXTURES / "photos" / ("cat.jpg", "coffee.jpg")[number % 2]) as picture:
            side = int(rng.integers(80, min(picture.size)))
            x, y = (int(rng.integers(0, length - side + 1)) for length in picture.size)
            picture.crop((x, y, x + side, y + side)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def photo_zip(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs among files of every kind that people's zips hold."""
    path = write_nasty_zip(tmp_path_factory.mktemp("zips") / "photographs.zip", holiday=6, huge=(1200, 900))
    with zipfile.ZipFile(path, "a") as archive:
        for picture in photographs:
            archive.write(picture, f"photographs/{picture.name}")
    return path


def drawings(background: str | None, folder: Path) -> PictureFiles:
    pictures = RenderedPictures(400, 5, 64)
    scenes = [i for i in range(400) if background in (None, pictures.scene(i, pictures.rng(i)).background)]
    for i in scenes[:24]:
        (folder / f"{i}.png").write_bytes(picture_bytes(pictures[i]))
    return PictureFiles(sorted(folder.glob("*.png")), 64)


@pytest.mark.parametrize("background", [None, "white"])
def test_a_model_that_knows_the_pictures_is_the_base(background: str | None, shapes: Networks, tmp_path: Path) -> None:
    choice = base.choose_base(shapes, drawings(background, tmp_path), TOY, on_gpu=True)
    assert choice.nats < base.STRANGE_NATS / 2
    assert choice.cosine < base.ALIKE_COSINE
    assert (choice.clip, choice.size, choice.files()) == ("", "base", [])
    assert choice.in_words() == "shapes, whose CLIP knows such pictures"


@pytest.mark.parametrize(
    ("settings", "on_gpu", "vqgan", "size"),
    [
        ({}, False, "", "laptop"),
        ({}, True, "imagenet-f16-1024", "base"),
        ({"stage": "transformer"}, False, "imagenet-f16-1024", "base"),
        ({"size": "small"}, True, "", "small"),
    ],
)
def test_published_weights_are_the_base_for_photographs(
    settings: dict[str, str], on_gpu: bool, vqgan: str, size: str, shapes: Networks, photographs: list[Path]
) -> None:
    pictures = PictureFiles(photographs, 64)
    choice = base.choose_base(shapes, pictures, replace(TOY, **settings), on_gpu)
    assert choice.nats > 3 * base.STRANGE_NATS
    assert choice.cosine > base.ALIKE_COSINE
    assert (choice.clip, choice.vqgan, choice.size) == ("ViT-B/32", vqgan, size)


def emoji_pictures(kind: str, folder: Path) -> PictureFiles:
    """Scenes of the emoji world, or its drawings alone, without outlines."""
    scenes, rng = EmojiScenes(24, 5, 128), np.random.default_rng(0)
    for i in range(24):
        if kind == "scenes":
            picture = Image.fromarray(scenes[i])
        else:
            picture = Image.new("RGBA", (128, 128), "white")
            picture.alpha_composite(
                Image.fromarray(drawing(str(rng.choice(list(things()))), "flat")).resize((128, 128))
            )
        picture.convert("RGB").save(folder / f"{i}.png")
    return PictureFiles(sorted(folder.glob("*.png")), 128)


@pytest.mark.parametrize(("kind", "is_known"), [("scenes", True), ("drawings", False), ("photographs", False)])
def test_the_clip_of_emoji_knows_its_scenes_and_nothing_else(
    kind: str, is_known: bool, photographs: list[Path], tmp_path: Path
) -> None:
    """Its activations are usual on cut-out photographs, but no remembered picture is near them."""
    pictures = PictureFiles(photographs, 128) if kind == "photographs" else emoji_pictures(kind, tmp_path)
    choice = base.choose_base(load_networks(ROOT / "checkpoints" / "emoji"), pictures, TOY, on_gpu=False)
    assert choice.is_known == is_known
    assert abs(choice.remembered - base.KNOWN_COSINE) > 0.03
    assert (choice.clip == "") == is_known


@pytest.mark.parametrize("kind", ["scenes", "drawings"])
@pytest.mark.parametrize("chosen", ["auto", str(ROOT / "checkpoints" / "emoji")])
def test_a_training_looks_at_what_the_base_remembers(
    kind: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it drops the memory from the networks that it trains."""
    (tmp_path / "pictures").mkdir()
    emoji_pictures(kind, tmp_path / "pictures")
    monkeypatch.setenv("COG_WEIGHTS", "emoji")
    training = Training(tmp_path / "pictures", tmp_path / "out", replace(TOY, base=chosen))
    monkeypatch.setattr("clip_gen.training.expectation.log_expectation", lambda training: None)
    dry_run(training)
    if kind == "scenes":
        assert training.choice is None or training.choice.is_known
        assert (training.choice is None) == (chosen != "auto")
    else:
        assert not training.choice.is_known
        assert bool(training.choice.warning) == (chosen != "auto")


def test_a_base_whose_clip_does_not_know_the_pictures_is_kept_with_a_warning(
    photo_zip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(TOY, base=str(ROOT / "checkpoints" / "shapes"), perceptual_weight=0.0)
    Training(photo_zip, tmp_path / "out", settings).run()
    warning = (
        "the CLIP of shapes does not know such pictures: the trained model will reconstruct them, but prompts about"
    )
    assert any(line.startswith(warning) for line in caplog.messages)
    record = json.loads((tmp_path / "out" / "model" / "training.json").read_text())
    assert any(line.startswith(warning) for line in record["warnings"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Prompts cannot be expected to work well: the CLIP of shapes does not know such pictures" in page


def test_a_clip_of_unknown_training_is_taken_to_know_everything(shapes: Networks, photographs: list[Path]) -> None:
    imported = replace(shapes, bridge=type(shapes.bridge)(128, shapes.bridge.config))
    assert base.choose_base(imported, PictureFiles(photographs, 64), TOY, on_gpu=False).clip == ""


@pytest.fixture
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is the bundled one. New networks are small, and nothing is downloaded from the internet."""
    sizes = (replace(TINY.vqgan, resolution=16), GPTConfig(n_layer=1, n_head=2, n_embd=16, rotary=True))
    monkeypatch.setitem(plan.MODEL_SIZES, "laptop", sizes)
    monkeypatch.setitem(plan.MODEL_SIZES, "medium", sizes)
    monkeypatch.setattr(pull, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(pull, "CLIP_BYTES", 10**8)
    monkeypatch.setattr(pull, "VQGAN_BYTES", 10**8)
    monkeypatch.setattr(download, "BACK_OFF_SECONDS", 0.001)
    monkeypatch.setenv("CLIP_GEN_MIRROR", "http://127.0.0.1:1")
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server(_small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    """Has small versions of OpenAI's CLIP and of taming's VQGAN."""
    (tmp_path / "theirs").mkdir()
    torch.save(clip_state(VIT), tmp_path / "theirs" / "clip.pt")
    vqgan, clip = taming_files(tmp_path / "theirs"), (tmp_path / "theirs" / "clip.pt").read_bytes()
    names = {"vqgan_imagenet_f16_1024.yaml": vqgan["model.yaml"], "vqgan_imagenet_f16_1024.ckpt": vqgan["last.ckpt"]}
    sha256 = hashlib.sha256(clip).hexdigest()
    monkeypatch.setitem(pull.CLIPS, "ViT-B/32", replace(pull.CLIPS["ViT-B/32"], sha256=sha256))
    with bad_server({"ViT-B-32.pt": clip, **names}) as started:
        monkeypatch.setenv("CLIP_GEN_MIRROR", started.address)
        yield started


@pytest.mark.usefixtures("_small")
def test_without_a_network_the_model_reconstructs_and_says_that_no_prompt_can_work(
    photo_zip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = replace(TOY, vqgan_steps=8, stage="vqgan", perceptual_weight=0.0)
    tar = Training(photo_zip, tmp_path / "out", settings).run()
    [warning] = {line for line in caplog.messages if "could not be downloaded" in line}
    assert warning.startswith(
        "the CLIP of shapes does not know such pictures, and ViT-B-32.pt could not be downloaded (Connection refused)"
    )
    assert f"no prompt about them can work; where there is a network, run {MODULE} pull clip ViT-B/32" in warning
    assert "to download: ViT-B-32.pt (354 MB, MIT)" in caplog.text
    record = json.loads((tmp_path / "out" / "model" / "training.json").read_text())
    assert warning in record["warnings"]
    assert record["base"]["model"] == "shapes"
    assert record["pictures"]["used"] == 58  # 24 and 6 photographs, and 28 odd ones
    reasons = {skipped["reason"] for skipped in record["pictures"]["skipped"]}
    assert {"a duplicate", "a text file", "camera raw: export as JPEG", "an archive inside: unpack it first"} <= reasons
    values = record["stages"]["vqgan"]
    assert values["val_psnr"] > max(18, values["val_mean_colour_psnr"] + 3)
    assert ClipGen.load(tar.parent / "model", "cpu").config.vqgan.resolution == 64


def test_photographs_train_new_networks_with_a_pulled_clip_and_then_draw(
    server: BadServer, photo_zip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.plan = ["well", "drop"]  # the first asks whether there is a network; then the download resumes
    assert main(["train", str(photo_zip), "--out", str(tmp_path / "out"), *options(TOY)]) == 0
    model = ClipGen.load(tmp_path / "out" / "model", "cpu")
    assert model.config.clip == VIT
    assert model.config.vqgan.resolution == 16
    theirs = load_file(tmp_path / "checkpoints" / "clip-vit-b-32" / "clip.safetensors")
    ours = model.clip_encoder.state_dict()["clip.text_projection"]
    assert torch.equal(ours, theirs["clip.text_projection"].half().float())
    words = ["generate", "a cat", "--model", str(tmp_path / "out" / "weights.tar"), "--out", str(tmp_path / "drawn")]
    assert main([*words, "--candidates=2", "--num-outputs=1"]) == 0
    with Image.open(tmp_path / "drawn" / "0.png") as picture:
        assert (picture.size, picture.text["prompt"]) == ((16, 16), "a cat")
    caplog.set_level(logging.INFO)
    # The same command resumes, also without the network.
    server.files = {}
    assert main(["train", str(photo_zip), "--out", str(tmp_path / "out"), *options(TOY)]) == 0
    assert "holds a finished training" in caplog.text


def test_on_a_gpu_photographs_train_a_pulled_vqgan_with_a_pulled_clip(
    server: BadServer, photo_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "on_gpu", lambda training: True)
    Training(photo_zip, tmp_path / "out", TOY).run()
    model = ClipGen.load(tmp_path / "out" / "model", "cpu")
    assert model.config.vqgan.ch_mult == (1, 1, 2, 2, 4)
    assert model.config.gpt.rotary
    assert len(model.generate("a cat", candidates=2, num_outputs=1, seed=0).images) == 1
    assert {path for path, _ in server.requests} == {f"/{name}" for name in server.files}


def test_a_dry_run_names_what_would_be_downloaded_and_downloads_nothing(
    server: BadServer, photo_zip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert main(["train", str(photo_zip), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "to download: ViT-B-32.pt (354 MB, MIT)" in caplog.messages
    assert caplog.messages[-1].endswith("python -m clip_gen pull clip ViT-B/32")
    assert server.requests == []


def options(settings: TrainSettings) -> list[str]:
    """Those that differ from the defaults."""
    words = []
    for name, value in vars(settings).items():
        if value != getattr(TrainSettings(), name):
            option = name.replace("_", "-")
            words.append(
                (f"--{option}" if value else f"--no-{option}") if type(value) is bool else f"--{option}={value}"
            )
    return words
