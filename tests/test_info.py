"""info.py and the metadata of pictures: enough to draw them again, and nothing private."""

from __future__ import annotations

import hashlib
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clip_gen.__main__ import main
from clip_gen.weights.model_folder import folder_sha256


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph with place and device in its EXIF, and a comment."""
    picture = Image.radial_gradient("L").resize((50, 40)).convert("RGB")
    exif = picture.getexif()
    exif[0x010F], exif[0x010E] = "SecretCam", '{"prompt": "SecretCam"}'
    exif.get_ifd(0x8825)[29] = "SecretPlace"  # GPS
    picture.save(tmp_path / "alice.jpg", exif=exif, comment=b"SecretComment")
    written = (tmp_path / "alice.jpg").read_bytes()
    assert all(word in written for word in (b"SecretCam", b"SecretPlace", b"SecretComment"))
    return tmp_path / "alice.jpg"


@pytest.fixture
def checkpoints(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models, of which one is damaged and has the same name."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(tiny_model_folder, folder / "mine")
    shutil.copytree(tiny_model_folder, folder / "a-damaged-one")
    (folder / "a-damaged-one" / "gpt.safetensors").unlink()
    monkeypatch.setattr("clip_gen.info.checkpoints_folder", lambda: folder)
    return folder


def drawn(model: Path, out: Path, *words: str) -> None:
    common = ["--model", str(model), "--out", str(out), "--candidates", "4", "--num-outputs", "2"]
    assert main(["generate", *common, *words]) == 0


def said(picture: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["info", str(picture)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "words",
    [
        ["a red circle"],
        ['a star:2 | it\'s \\: a\nnew "line":1', "--negative-prompt=-1", "--top-p=0.9", "--output-format=webp"],
        ["--image=PHOTO", "--output-format=jpg", "--output-quality=70", "--temperature=0"],
        ["-- a star", "--image=PHOTO", "--image-weight=0.3", "--no-clip-rerank", "--guidance=2"],
    ],
)
def test_the_printed_command_writes_the_same_files(
    words: list[str], photo: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawn(checkpoints / "mine", tmp_path / "first", *(word.replace("PHOTO", str(photo)) for word in words))
    pictures = sorted((tmp_path / "first").iterdir())
    dtype, python, *command = shlex.split("\n".join(said(pictures[-1], capsys)).partition("\nmodel: ")[0])
    assert (python, command[:2]) == ("python", ["-m", "clip_gen"])
    monkeypatch.setenv(*dtype.split("="))
    again = [word.replace("=IMAGE", f"={photo}") for word in command[2:]]
    assert main([again[0], f"--out={tmp_path / 'again'}", *again[1:]]) == 0
    assert [(tmp_path / "again" / one.name).read_bytes() for one in pictures] == [one.read_bytes() for one in pictures]


def test_it_prints_the_hashes_of_model_and_image(
    photo: Path, tiny_model_folder: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(tiny_model_folder, tmp_path / "out", f"--image={photo}", "--seed=3")
    lines = said(tmp_path / "out" / "1.png", capsys)
    model = folder_sha256(tiny_model_folder)
    assert f"--model={checkpoints / 'mine'} --image=IMAGE" in lines[0]
    assert lines[1] == f"model: tiny, sha256 {model}"
    assert lines[2] == f"image: sha256 {hashlib.sha256(photo.read_bytes()).hexdigest()}; put its file in place of IMAGE"
    assert lines[3].startswith("this picture: number 1 of 2, score ")
    shutil.rmtree(checkpoints / "mine")
    lines = said(tmp_path / "out" / "1.png", capsys)
    assert "--model=MODEL" in lines[0]
    assert lines[1] == f"model: tiny, sha256 {model}; put its folder, tar or URL in place of MODEL"
    names = [*(f"{part}.safetensors" for part in ("clip", "vqgan", "gpt", "bridge"))]
    listed = [f"{hashlib.sha256((tiny_model_folder / name).read_bytes()).hexdigest()}  {name}\n"
              for name in ("config.yaml", *names)]  # fmt: skip
    assert hashlib.sha256("".join(listed).encode()).hexdigest() == model


def test_a_picture_of_an_earlier_version_gives_a_command_too(
    tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    earlier = {"prompt": "a star", "candidates": "16", "num_outputs": "4", "clip_rerank": "True", "seed": "7"}
    for name, value in (earlier | {"model": "tiny", "score": "0.3"}).items():
        info.add_itxt(name, value)
    Image.new("RGB", (4, 4)).save(tmp_path / "old.png", pnginfo=info)
    assert said(tmp_path / "old.png", capsys) == [
        "python -m clip_gen generate --model=MODEL --candidates=16 --num-outputs=4 --seed=7 --clip-rerank -- 'a star'",
        "model: tiny, sha256 not recorded; put its folder, tar or URL in place of MODEL",
    ]


@pytest.mark.parametrize("output_format", ["png", "webp", "jpg"])
@pytest.mark.parametrize("metadata", ["--output-metadata", "--no-output-metadata"])
def test_nothing_of_an_input_picture_but_its_hash_reaches_an_output(
    photo: Path, tiny_model_folder: Path, tmp_path: Path, output_format: str, metadata: str
) -> None:
    drawn(tiny_model_folder, tmp_path / "out", f"--image={photo}", f"--output-format={output_format}", metadata)
    for picture in (tmp_path / "out").iterdir():
        written = picture.read_bytes()
        assert not [word for word in (b"Secret", b"alice", str(tmp_path).encode()) if word in written]
        assert (hashlib.sha256(photo.read_bytes()).hexdigest().encode() in written) == (metadata[2:4] != "no")


def test_pictures_without_settings_are_refused(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("hello")
    for picture, sentence in [
        (photo, "has no settings of this program; it was drawn elsewhere or without them"),
        (tmp_path / "text.png", "cannot be read (no PNG, WebP or JPEG file); give a picture that this program drew"),
        (tmp_path / "absent.png", "cannot be read (No such file or directory); give"),
    ]:
        assert main(["info", str(picture)]) == 1
        assert sentence in capsys.readouterr().err
