"""evaluation/optimisation.py, and the command `optimise`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.evaluation.optimisation import OptimisationSettings, cutouts, optimise, spherical_distance
from clip_gen.files import ROOT

SMALL = OptimisationSettings(rate=0.15, cutouts=2, smallest=0.9, degrees=0.0, flip=False)
STILL = OptimisationSettings(cutouts=3, smallest=1.0, degrees=0.0, flip=False, noise=0.0)


def test_the_score_grows_and_a_seed_draws_the_same() -> None:
    model, prompt = ClipGen.load(ROOT / "checkpoints" / "shapes", "cpu"), "a large red square on a gray background"
    found = optimise(model, prompt, [1, 15], 3, SMALL)
    assert [snapshot.steps for snapshot in found] == [1, 15]
    assert found[1].score > found[0].score + 0.03
    assert 0 < found[0].seconds < found[1].seconds
    again = optimise(model, prompt, [1], 3, SMALL)[0]
    assert again.picture.tobytes() == found[0].picture.tobytes()
    assert not any(parameter.requires_grad for parameter in model.vqgan.parameters())


def test_cutouts_without_augmentation_are_the_picture() -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(cutouts(image, 16, generator, STILL), image.expand(3, -1, -1, -1), atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"smallest": 0.5}, {"degrees": 30.0}, {"noise": 0.2}, {"flip": True, "cutouts": 8}], ids=str
)
def test_each_augmentation_varies_the_cutouts(change: dict) -> None:
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    cut = cutouts(image, 16, torch.Generator().manual_seed(0), replace(STILL, **change))
    assert not torch.allclose(cut, image.expand_as(cut), atol=1e-3)
    if "flip" in change:  # each is the picture or its mirror image, and both occur
        same = [torch.allclose(one, image[0], atol=1e-5) for one in cut]
        mirrored = [torch.allclose(one, image[0].flip(2), atol=1e-5) for one in cut]
        assert [a + b for a, b in zip(same, mirrored, strict=True)] == [1] * 8
        assert any(same)
        assert any(mirrored)


def test_the_spherical_distance_is_that_of_angles() -> None:
    turned = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    angles = torch.tensor([0.0, torch.pi / 2, torch.pi])
    assert torch.allclose(spherical_distance(turned, torch.tensor([[1.0, 0.0]])), 2 * (angles / 2) ** 2, atol=1e-3)


def test_the_command_measures_both_methods_resumes_and_plots(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_gen.evaluation.against_time.REAL", 24)
    words = ["optimise", str(tiny_model_folder), "--world", "shapes", "--prompts", "2", "--steps", "2", "1"]
    words += ["--candidates", "4", "1", "--cutouts", "2", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    points = [(point["method"], point["budget"], point["prompts"]) for point in results["points"]]
    assert points == [("candidates", 1, 4), ("candidates", 4, 4), ("steps", 1, 4), ("steps", 2, 4)]
    scores = [point["clip_score"]["value"] for point in results["points"]]
    assert scores[1] >= scores[0]  # the best of more candidates
    seconds = [point["seconds"] for point in results["points"]]
    assert seconds[2] < seconds[3]
    records = (tmp_path / "out" / "measured.jsonl").read_text()
    (tmp_path / "out" / "measured.jsonl").write_text(records[:-40])  # killed while it wrote the last prompt's line
    assert main(words) == 0
    lines = (tmp_path / "out" / "measured.jsonl").read_text().splitlines()
    assert (lines[:3], len(lines)) == (records.splitlines()[:3], 4)
    assert "VQGAN+CLIP, 2 steps" in capsys.readouterr().out
    for name in ("accuracy", "clip_score", "cmmd"):
        words = list(ElementTree.parse(tmp_path / "out" / f"{name}.svg").getroot().itertext())
        assert {"CLIP-GEN, best of so many", "VQGAN+CLIP, so many steps", "seconds a picture"} <= set(words)
        assert {"4", "2"} <= set(words)  # candidates, and steps


def test_bad_values_are_one_sentence(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["--steps", "0"], "steps is 0; give"),
        (["--candidates", "0"], "candidates is 0; give"),
        (["--world", "shapes", "--kinds", "three"], 'no kind of prompts is called "three"; choose from one, two'),
        ([], 'the name of the model, "tiny", does not tell what it draws; add --world shapes or --world emoji'),
    ):
        assert main(["optimise", str(tiny_model_folder), *words]) == 1
        assert sentence in capsys.readouterr().err
    assert not (ROOT / "runs" / "optimisation").exists()
