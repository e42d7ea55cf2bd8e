"""training/folder.py: a training writes only into folders of its own, and resumes those of earlier versions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from clip_gen.__main__ import main
from clip_gen.files import MARK
from clip_gen.training.folder import check, claim
from clip_gen.training.plan import TrainSettings

# The names of the files that commit 72e9866 wrote for a training with toy settings.
LAYOUT = """
model/bridge.safetensors model/clip.safetensors model/gpt.safetensors model/training.json model/vqgan.safetensors
report.html weights.tar work/encoded/embeddings-held_back.npy work/encoded/embeddings-learnt.npy
work/encoded/neighbours-learnt.npy work/encoded/tokens-held_back.npy work/encoded/tokens-learnt.npy work/gpt/best.ckpt
work/gpt/gpt.safetensors work/gpt/grids/0000001.png work/gpt/history.jsonl work/gpt/last.ckpt work/gpt/ledger.json
work/gpt/record.json work/lock work/source work/vqgan/grids/0000001.png work/vqgan/history.jsonl work/vqgan/last.ckpt
work/vqgan/ledger.json work/vqgan/perceptual_loss work/vqgan/record.json work/vqgan/tokens.json
work/vqgan/vqgan.safetensors
"""
FINISHED = LAYOUT.split()
UNFINISHED = [name for name in FINISHED if name.startswith(("work/vqgan/h", "work/vqgan/l", "work/lock", "work/s"))]
PICTURES = ["work/pictures/000001.png", "work/pictures/000002.jpeg"]


def write(out: Path, *names: str) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("" if name == "work/lock" else name)


def write_pictures(out: Path) -> None:
    write(out, *PICTURES)
    index = {"files": [Path(name).name for name in PICTURES], "used": 2, "skipped": []}
    (out / "work" / "pictures" / "pictures.json").write_text(json.dumps(index))


def write_settings(out: Path, **more: object) -> None:
    settings = asdict(TrainSettings()) | {"base": "99072b", "on_gpu": False} | more
    settings.pop("max_minutes")
    write(out, "work/settings.json")
    (out / "work" / "settings.json").write_text(json.dumps(settings, indent=1))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(out: Path) -> None:
    write(out, *FINISHED)
    (out / "model" / "config.yaml").write_text("name: trained\nclip: {}\nvqgan: {}\ngpt: {}\nbridge: {}\n")
    write_pictures(out)
    write_settings(out)


def unfinished(out: Path) -> None:
    write(out, *UNFINISHED, "work/vqgan/.clip-gen-saving-x1y2")
    write_pictures(out)
    write_settings(out)


def of_an_older_version(out: Path) -> None:
    unfinished(out)
    path = out / "work" / "settings.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({name: known[name] for name in known if name not in ("tokens", "on_gpu", "mean_shift")}))


@pytest.mark.parametrize("make", [finished, unfinished, of_an_older_version])
def test_a_folder_of_a_version_without_marks_is_used_and_marked(tmp_path: Path, make: object) -> None:
    make(tmp_path)
    before = everything(tmp_path)
    check(tmp_path)
    assert everything(tmp_path) == before
    claim(tmp_path)
    assert everything(tmp_path).keys() - before.keys() == {MARK}
    (tmp_path / "work" / "settings.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path)  # by its mark


def pictures_and_model(out: Path) -> None:
    write(out, "work/pictures/holiday.jpg", "model/car.blend")


def settings_of_another_program(out: Path) -> None:
    write(out, "model/car.blend")
    write(out, "work/settings.json")
    (out / "work" / "settings.json").write_text('{"stage": "production", "seed": 3}')


def lock_of_another_program(out: Path) -> None:
    write(out, "work/lock", "work/thesis.tex")


def pictures_beside_ours(out: Path) -> None:
    write(out, "work/lock", "work/source", "work/pictures/holiday.jpg")
    write_pictures(out)


REFUSED = {
    pictures_and_model: "holds model and is no training folder",
    settings_of_another_program: "holds model and is no training folder",
    lock_of_another_program: "holds work and is no training folder",
    pictures_beside_ours: "holds work and is no training folder",
    lambda out: write(out, "work/pictures/holiday.jpg"): "holds work and is no training folder",
    lambda out: write(out, "notes.txt"): "holds notes.txt and is no training folder",
    lambda out: write(out, "00.png", "01.png"): "holds 00.png and is no training folder",
    lambda out: write(out, "model/config.yaml"): "holds model and is no training folder",
    lambda out: write(out, "weights.tar"): "holds weights.tar and is no training folder",
}


@pytest.mark.parametrize(("make", "sentence"), REFUSED.items())
def test_a_folder_of_a_person_is_refused_and_untouched(
    make: object, sentence: str, photos: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    make(out)
    before = everything(out)
    assert main(["train", str(photos), "--out", str(out), "--base", str(tiny_model_folder)]) == 1
    assert f"{out} {sentence} of this program; name a new or an empty one" in capsys.readouterr().err
    assert everything(out) == before


@pytest.mark.parametrize("make", [finished, claim])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model/car.blend", "model holds car.blend and is no model folder"),
        ("work/pictures/holiday.jpg", "pictures holds holiday.jpg, which no training put there"),
    ],
)
def test_a_persons_files_in_a_trainings_folder_are_refused_by_name(
    make: object, name: str, sentence: str, photos: Path, tiny_model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    make(out)
    write(out, name)
    before = everything(out)
    assert main(["train", str(photos), "--out", str(out), "--base", str(tiny_model_folder)]) == 1
    assert sentence in capsys.readouterr().err
    assert everything(out) == before
