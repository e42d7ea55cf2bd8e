"""enlarging.py: output_size, by the pulled upscaler or by Lanczos interpolation."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from upscaler_files import reference, upscaler_state

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.enlarging import enlarger
from clip_gen.files import MODULE
from clip_gen.images import to_pil, to_tensor
from clip_gen.pipeline import Stopped
from clip_gen.weights.importers.upscaler import import_upscaler

CPU = torch.device("cpu")


@pytest.fixture
def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))


def drawn(model: Path, out: Path, *words: str) -> list[Image.Image]:
    fixed = ["--model", str(model), "--out", str(out), "--seed=1", "--candidates=4", "--num-outputs=2"]
    assert main(["generate", "a star", *fixed, *words]) == 0
    return [Image.open(out / f"{i}.png") for i in range(2)]


def test_the_upscaler_gives_what_its_paper_says(upscaler: Path, picture: Image.Image) -> None:
    with torch.inference_mode():
        wanted = to_pil(reference(upscaler_state(), (to_tensor([picture]) + 1) / 2) * 2 - 1)[0]
    assert len(wanted.getcolors(10**6)) > 100  # not white or black alone
    four, two = (enlarger(size, CPU)(picture) for size in ("4x", "2x"))
    difference = np.asarray(four, int) - np.asarray(wanted, int)
    assert np.abs(difference).max() <= 1
    assert two.tobytes() == four.resize((24, 24), Image.Resampling.LANCZOS).tobytes()


def test_without_an_upscaler_lanczos_enlarges_and_the_log_says_so(
    picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    assert enlarger("4x", CPU)(picture).tobytes() == picture.resize((48, 48), Image.Resampling.LANCZOS).tobytes()
    assert f"output_size is 4x: Lanczos interpolation enlarges the pictures; `{MODULE} pull upsc" in caplog.text
    caplog.clear()
    assert enlarger("1x", CPU)(picture) is picture
    assert not caplog.records


@pytest.mark.usefixtures("upscaler")
def test_the_log_names_the_upscaler(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    enlarger("2x", CPU)
    assert "output_size is 2x: Real-ESRGAN enlarges the pictures" in caplog.text


def test_it_can_be_stopped_between_two_pictures(picture: Image.Image) -> None:
    answers = [False, True]
    enlarge = enlarger("2x", CPU, lambda: answers.pop(0))
    assert enlarge(picture).size == (24, 24)
    with pytest.raises(Stopped):
        enlarge(picture)


@pytest.mark.parametrize("size", ["2x", "4x"])
def test_pictures_scores_and_order_are_those_of_the_own_size(
    size: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    own = drawn(tiny_model_folder, tmp_path / "own")
    large = drawn(tiny_model_folder, tmp_path / "large", f"--output-size={size}", "--output-grid")
    factor = int(size[0])
    for small, big in zip(own, large, strict=True):
        wanted = small.resize((16 * factor, 16 * factor), Image.Resampling.LANCZOS)
        assert big.tobytes() == wanted.tobytes()
        assert (big.text["score"], big.text["seed"]) == (small.text["score"], small.text["seed"])
        assert (big.text["output_size"], big.text["upscaler"]) == (size, "lanczos")
        assert not {"output_size", "upscaler"} & small.text.keys()
    assert Image.open(tmp_path / "large" / "grid.png").size == (44, 24)  # at the model's own size


def test_info_prints_what_enlarged_a_picture_and_its_command_draws_it_again(
    upscaler: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(tiny_model_folder, tmp_path / "first", "--output-size=4x")
    capsys.readouterr()
    assert main(["info", str(tmp_path / "first" / "0.png")]) == 0
    said = capsys.readouterr().out
    sha256 = hashlib.sha256((upscaler / "upscaler.safetensors").read_bytes()).hexdigest()
    assert "--output-size=4x" in said
    assert f"enlarged to 4x by the upscaler with sha256 {sha256}" in said
    drawn(tiny_model_folder, tmp_path / "again", "--output-size=4x")
    for name in ("0.png", "1.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_lines_of_a_prompts_file_have_sizes_of_their_own(tiny_model: ClipGen, tiny_model_folder: Path, tmp_path: Path):
    (tmp_path / "prompts.csv").write_text("prompt,output_size\na star,4x\na heart,\n")
    words = ["generate", "--prompts-file", str(tmp_path / "prompts.csv"), "--model", str(tiny_model_folder)]
    assert main([*words, "--out", str(tmp_path), "--num-outputs=1", "--candidates=2"]) == 0
    assert [Image.open(tmp_path / f"000{line}.0.png").size for line in (2, 3)] == [(64, 64), (16, 16)]
    records = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert {record["line"]: record.get("output_size") for record in records} == {2: "4x", 3: None}


def test_an_unknown_size_is_refused(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,output_size\na star,3x\n")
    words = ["generate", "--prompts-file", str(tmp_path / "prompts.csv"), "--model", str(tiny_model_folder)]
    assert main(words) == 1
    assert "prompts.csv line 2: output_size is '3x'; give one of 1x, 2x, 4x" in capsys.readouterr().err


def test_damaged_weights_are_reported(upscaler: Path, tmp_path: Path) -> None:
    (upscaler / "upscaler.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"upscaler\.safetensors: is damaged"):
        enlarger("2x", CPU)
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: tensors such as .* are of no upscaler that is known; "):
        import_upscaler(tmp_path / "other.pth", tmp_path / "new", "")
    state = upscaler_state()
    state["conv_last.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"nan\.pth: conv_last\.bias holds numbers that are not finite"):
        import_upscaler(tmp_path / "nan.pth", tmp_path / "new", "")
    assert not (tmp_path / "new").exists()
