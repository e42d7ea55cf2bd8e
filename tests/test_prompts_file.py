"""prompts_file.py: many prompts from a file, in shared batches, resumed after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from clip_gen import pipeline
from clip_gen.__main__ import main
from clip_gen.hardware import own_share
from clip_gen.sampling.batch_requests import Batch


@pytest.fixture
def words(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    """A command without its file of prompts."""
    few = ["--candidates=2", "--num-outputs=1", "--seed=7"]
    return ["generate", "--model", str(tiny_model_folder), "--out", str(tmp_path / "out"), *few, "--prompts-file"]


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def records(tmp_path: Path) -> dict[str, dict]:
    lines = (tmp_path / "out" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["file"]: record for record in map(json.loads, lines)}


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_each_line_of_a_text_is_a_prompt_in_a_common_batch(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(*given: object, **named: object) -> Batch:
        sizes.append(len(given[1]))
        return Batch(*given, **named)

    monkeypatch.setattr("clip_gen.sampling.batch_requests.Batch", counted)
    for name in ("WAIT_SECONDS", "MAX_WAIT_SECONDS"):
        monkeypatch.setattr(f"clip_gen.sampling.batcher.{name}", 1.0)  # however busy the machine
    path = written(tmp_path / "prompts.txt", "\ufeffa red circle\n\n  赤い円:2 | a star \r\na heart")
    assert main([*words, path]) == 0
    found = records(tmp_path)
    assert sizes == [6]
    assert {name: record["prompt"] for name, record in found.items()} == {
        "0001.0.png": "a red circle",
        "0003.0.png": "赤い円:2 | a star",
        "0004.0.png": "a heart",
    }
    for name, record in found.items():
        assert (record["seed"], record["num_outputs"], record["model"]) == (7, 1, "tiny")
        assert Image.open(tmp_path / "out" / name).text["score"] == str(record["score"])


def test_lines_of_csv_and_jsonl_have_settings_of_their_own(words: list[str], tmp_path: Path) -> None:
    table = written(
        tmp_path / "a.csv", 'prompt,seed,top_p,clip_rerank,output_format\n"a star, red",9,,,\na heart,,0.5,False,webp\n'
    )
    rows = [
        {"prompt": "a star, red", "seed": 9, "image": None},
        {"prompt": "a heart", "top_p": 0.5, "clip_rerank": False, "output_format": "webp"},
    ]
    lines = written(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows)))
    assert main([*words, table, "--name=table"]) == 0
    assert main([*words, lines, "--name=lines"]) == 0
    for first, second in (("table.0002.0.png", "lines.0001.0.png"), ("table.0003.0.webp", "lines.0002.0.webp")):
        assert (tmp_path / "out" / first).read_bytes() == (tmp_path / "out" / second).read_bytes()
    alone = [*words[:-1], "a star, red", "--seed=9", "--name=alone"]
    assert main(alone) == 0
    assert pixels(tmp_path / "out" / "alone.0.png") == pixels(tmp_path / "out" / "lines.0001.0.png")
    assert records(tmp_path)["table.0003.0.webp"]["top_p"] == 0.5


def test_a_second_run_draws_only_what_is_missing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "prompts.txt", "a star\na heart\na circle\na ring")
    assert main([*words, path]) == 0
    out, before = tmp_path / "out", records(tmp_path)
    bytes_before = {name: (out / name).read_bytes() for name in before}
    (out / "0002.0.png").unlink()
    (out / "0003.0.png").unlink()
    manifest = (out / "manifest.jsonl").read_text()
    kept = [line for line in manifest.splitlines() if "0003" not in line]
    (out / "manifest.jsonl").write_text("\n".join(kept)[:-30])  # the process was killed while it wrote the last one
    lost = json.loads(kept[-1])["file"]
    (out / lost).unlink(missing_ok=True)
    times = {name: (out / name).stat().st_mtime_ns for name in before if (out / name).exists()}
    capsys.readouterr()
    assert main([*words, path]) == 0
    assert f"{len(times)} of 4 prompts were drawn before" in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert {name: (out / name).read_bytes() for name in before} == bytes_before
    assert records(tmp_path) == before


def test_a_run_that_was_killed_between_the_pictures_of_a_line_resumes(words: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.txt", "a red circle")
    assert main([*words, path, "--num-outputs=2"]) == 0
    kept = pixels(tmp_path / "out" / "0001.1.png")
    (tmp_path / "out" / "0001.1.png").unlink()
    assert main([*words, path, "--num-outputs=2"]) == 0
    assert pixels(tmp_path / "out" / "0001.1.png") == kept
    assert sorted(records(tmp_path)) == ["0001.0.png", "0001.1.png"]


def test_pictures_of_a_changed_line_are_replaced_only_with_overwrite(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    assert main([*words, written(path, "a star\na heart")]) == 0
    picture = tmp_path / "out" / "0002.0.png"
    before = picture.read_bytes()
    assert main([*words, written(path, "a star\na ring")]) == 1
    assert "0002.0.png exists already; give --overwrite, or name another folder" in capsys.readouterr().err
    assert picture.read_bytes() == before
    assert main([*words, str(path), "--overwrite"]) == 0
    assert Image.open(picture).text["prompt"] == "a ring"
    assert [record["prompt"] for record in records(tmp_path).values()] == ["a star", "a ring"]
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "a star\n???", "a.txt line 2: prompt is '???', without a letter"),
        ("a.txt", "\n\na: x | b", "a.txt line 3: prompt has the part 'a: x', whose weight is 'x'"),
        ("a.txt", " \n", "a.txt: holds no prompts"),
        ("a.csv", "prompt,top_p\na star,2", "a.csv line 2: top_p is 2.0; give a number, 0 to 1"),
        ("a.csv", "prompt,topp\na star,2", "a.csv line 2: there is no setting 'topp'; the settings are prompt, image,"),
        ("a.csv", "prompt\na star,2", "a.csv line 2: it has more cells than the header"),
        ("a.csv", "prompt,seed\na star,x", "a.csv line 2: seed is 'x'; give a whole number"),
        ("a.csv", "prompt,clip_rerank\na star,1", "a.csv line 2: clip_rerank is '1'; give true or false"),
        ("a.csv", "seed\n7", "a.csv line 2: there is neither a prompt nor an image"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 5}', "a.jsonl line 2: prompt is 5; say what to draw"),
        ("a.jsonl", "[1]", "a.jsonl line 1: [1] is no object such as"),
        ("a.jsonl", '{"prompt": ', "a.jsonl line 1: Expecting value"),
        ("a.jsonl", '{"image": "nowhere.png"}', "a.jsonl line 1: image is 'nowhere.png', which cannot be read"),
        ("a.jsonl", '{"prompt": "a", "output_format": "gif"}', "line 1: output_format is 'gif'; give one of png, webp"),
    ],
)
def test_a_bad_line_is_named_before_a_model_is_loaded(
    name: str, text: str, sentence: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "load_networks", None)
    assert main([*words, written(tmp_path / name, text)]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_one_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.txt").write_bytes(bytes(range(256)))
    assert main([*words, str(tmp_path / "photo.txt")]) == 1
    assert "photo.txt: cannot be read (it is not UTF-8 text); give a text, CSV or JSONL" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "absent.txt")]) == 1
    assert "absent.txt: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_processes_of_torchrun_share_the_lines_and_the_manifest(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "prompts.txt", "\n".join(f"a star number {i}" for i in range(5)))
    assert main([*words[:3], "--out", str(tmp_path / "alone"), *words[5:], path]) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", ["0002", "0004"]), ("0", ["0001", "0002", "0003", "0004", "0005"])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main([*words, path]) == 0
        assert sorted(records(tmp_path)) == [f"{number}.0.png" for number in there]
    for name in records(tmp_path):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_each_process_of_torchrun_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_share() == (0, 1)
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert own_share() == (5, 8)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert own_share() == (5, 8)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
