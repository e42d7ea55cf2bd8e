"""The commands of docs/evaluation.md that measure the COCO model, on a small set in COCO's format."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from clip_gen.__main__ import main
from clip_gen.files import ROOT


def small_coco(folder: Path) -> None:
    """val2014.zip with 12 pictures, and their captions, two each."""
    assert main(["shapes", "--count", "12", "--seed", "3", "--out", str(folder / "pictures")]) == 0
    with zipfile.ZipFile(folder / "val2014.zip", "w") as archive:
        for path in (folder / "pictures").glob("*.png"):
            archive.write(path, f"val2014/{path.name}")
    captions = [
        {"id": 10 * i + j, "image_id": i, "caption": f"a red circle|star: {i}.{j}\n"} for i in range(12) for j in (0, 1)
    ]
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))


def test_the_commands_for_coco_run_as_documented(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "docs" / "evaluation.md").read_text().partition("### The column of the COCO model")[2]
    commands = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert [command.split()[3:5] for command in commands[:3]] == [
        ["pull", "coco"], ["pull", "inception"], ["pull", "clip"]
    ]  # fmt: skip
    small_coco(tmp_path)
    monkeypatch.chdir(tmp_path)
    script, count = commands[4].partition(" > ")[0].split()[:2], "9"
    prompts = subprocess.run([ROOT / script[0], script[1], count], capture_output=True, text=True, check=True).stdout
    (tmp_path / "prompts.txt").write_text(prompts)
    assert len({line.partition(": ")[2].partition(".")[0] for line in prompts.splitlines()}) == 9  # of nine pictures
    words = commands[5].partition("-m clip_gen ")[2].split()
    there = {"checkpoints/coco": str(tiny_model_folder), "checkpoints/clip-vit-l-14-336px": str(tiny_model_folder)}
    assert main([there.get(word, word) for word in words] + ["--count", "8", "--top-k", "9"]) == 0
    report = json.loads((tmp_path / "runs" / "coco" / "report.json").read_text())
    found = {figure["name"]: figure for figure in report["figures"] if figure["source"] == "from prompts"}
    assert {"FID", "FID-1", "FID-2", "KID × 1000", "CMMD", "precision", "recall", "CLIP score", "R-precision"} <= set(
        found
    )
    assert found["FID-2"]["pictures"] == 9
    assert found["FID-2"]["value"] != found["FID"]["value"]
    assert report["hardest_prompts"][0]["prompt"].startswith("a red circle|star: ")  # no part of another prompt


def test_more_prompts_than_pictures_or_captions(tmp_path: Path) -> None:
    small_coco(tmp_path)
    words = [ROOT / "script" / "coco-prompts", "captions_val2014.json"]
    run = subprocess.run([*words, "20"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(set(run.stdout.splitlines())) == 20
    again = subprocess.run([*words, "13"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == run.stdout.splitlines()[:13]
    too_many = subprocess.run([*words, "25"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert too_many.returncode == 1
    assert "holds 24 captions; ask for so many or fewer" in too_many.stderr
