"""training/report.py, verdict.py and curves.py: what the page of a training says."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from clip_gen.data.manifest import Pictures
from clip_gen.training.curves import CHARTS, charts
from clip_gen.training.grids import read_grid, save_grid
from clip_gen.training.plan import TrainSettings, plan
from clip_gen.training.report import evenly_spread, training_record, write_report
from clip_gen.training.verdict import resolved_settings, verdict

VQGAN = {"steps": 900, "planned_steps": 4000, "minutes": 3.0, "tokens_kept": True}
VQGAN |= {"val_psnr": 22.3, "val_mean_colour_psnr": 11.0}
GPT = {"steps": 2000, "planned_steps": 2000, "ended_by": "steps", "minutes": 9.0, "recognised": 0.75}
SHAPES = {"name": "shapes", "knows": "circles and squares"}
PROMPTS_WORK = "Prompts can be expected to work"
THEY_DO_NOT = "Prompts cannot be expected to work well: "


def record(
    stages: Mapping[str, dict[str, object]], base: Mapping[str, str] = SHAPES, **settings: object
) -> dict[str, object]:
    pictures, chosen = Pictures([Path(f"{i}.png") for i in range(100)], []), TrainSettings(**settings)
    planned = plan(chosen, TINY, 100)
    return training_record(chosen, planned, pictures, 5, dict(stages), 12.0, base)


def test_the_verdict_says_what_was_trained_on_what_and_how_well_it_reconstructs() -> None:
    said = verdict(record({"vqgan": VQGAN, "gpt": GPT}))
    assert said.startswith(
        "The VQGAN's decoder and the transformer of the base model shapes were trained further, on 95 pictures at "
        "16 × 16 pixels. 5 more were held back to measure on. "
    )
    assert "back at 22.3 dB (PSNR), 11.3 dB above their mean colours, which is good: edges and larger" in said
    assert "CLIP finds 75% nearest to the right picture." in said
    assert PROMPTS_WORK in said
    assert "knows its own world and nothing else. It knows circles and squares." in said
    new = verdict(record({"vqgan": VQGAN | {"tokens_kept": False, "val_psnr": 12.0}, "gpt": GPT}, size="laptop"))
    assert new.startswith("New networks of size laptop, the VQGAN and the transformer, were trained with the CLIP of")
    assert f"{THEY_DO_NOT}reconstructions are poor." in new


@pytest.mark.parametrize(
    ("gpt", "problem"),
    [
        ({"steps": 90, "ended_by": "time"}, "the transformer had 90 of 2,000 steps."),
        ({"recognised": 0.25}, "what is drawn hardly follows its embedding, or the pictures are much alike."),
        ({"psnr": 14.0}, "reconstructions are poor."),
    ],
)
def test_the_verdict_names_what_prompts_fail_by(gpt: dict[str, object], problem: str) -> None:
    said = verdict(record({"gpt": GPT | gpt}, stage="transformer"))
    assert said.startswith("The transformer of the base model shapes was trained further")
    assert THEY_DO_NOT + problem in said
    assert ("more max_minutes" in said) == (gpt.get("ended_by") == "time")


@pytest.mark.parametrize(
    ("psnr", "mean_colour", "word"),
    [
        (38.3, 17.0, "very good"),
        (25.1, 17.0, "fair"),  # blurs on a plain ground
        (20.0, 13.0, "fair"),  # a published VQGAN on photographs
        (30.0, 28.0, "poor"),  # pale pictures
        (14.0, 6.0, "poor"),
    ],
)
def test_plain_pictures_do_not_count_as_well_reconstructed(psnr: float, mean_colour: float, word: str) -> None:
    measured = {"val_psnr": psnr, "val_mean_colour_psnr": mean_colour}
    assert f", which is {word}: " in verdict(record({"vqgan": VQGAN | measured, "gpt": GPT}))
    same = GPT | {"psnr": psnr, "mean_colour_psnr": mean_colour}  # of a base's VQGAN
    assert f", which is {word}: " in verdict(record({"gpt": same}, stage="transformer"))


def test_a_vqgan_alone_works_with_prompts_only_if_its_tokens_were_kept() -> None:
    kept, learnt = (verdict(record({"vqgan": VQGAN | {"tokens_kept": one}}, stage="vqgan")) for one in (True, False))
    assert "Prompts work as with the base model" in kept
    assert "Prompts cannot work with these weights alone" in learnt


def test_while_a_training_runs_the_verdict_promises_nothing() -> None:
    said = verdict(record({"vqgan": {"steps": 3, "minutes": 0}}, {"name": "openai"}), is_running=True)
    assert said.startswith("The VQGAN and the transformer of the base model openai are trained further")
    assert "What prompts can do shows at the end. Words come from the CLIP of openai" in said


def test_settings_are_shown_as_chosen_and_as_used() -> None:
    stages = {"vqgan": VQGAN | {"precision": "bf16-mixed", "perceptual_loss": "LPIPS"}, "gpt": GPT}
    rows = {name: (chosen, used) for name, chosen, used, _ in resolved_settings(record(stages, vqgan_steps=4000))}
    assert set(rows) == set(TrainSettings.__dataclass_fields__)
    assert rows["vqgan_steps"] == ("4000", "4,000")
    assert rows["transformer_steps"] == ("default", "2,000")
    assert rows["base"] == ("default", "shapes")
    assert rows["resolution"] == ("default", "16")
    assert rows["batch_size"] == ("default", "8 in stage 1, 16 in stage 2")
    assert rows["tokens"] == ("default", "keep")
    assert rows["precision"] == ("default", "bf16-mixed")
    assert rows["perceptual_weight"] == ("default", "0.2, by LPIPS")
    assert rows["max_minutes"] == ("default", "no limit")
    assert rows["transformer_learning_rate"] == ("default", "0.0009; Muon's 0.0036")


def svg(figure: str) -> str:
    return base64.b64decode(re.search('base64,([^"]+)', figure)[1]).decode()


def test_curves_have_titles_units_and_meanings() -> None:
    pytest.importorskip("matplotlib")
    history = [{"step": step, "l1": 0.1 + 1 / step, "learning_rate": 1e-3} for step in range(1, 101)]
    history += [{"step": 50, "val_psnr": 18.0}, {"step": 100, "val_psnr": 21.0}, {"step": 100, "l1": float("nan")}]
    history += [{"step": 100, "perceptual": 0.3}]  # one point is no curve
    figures = charts("vqgan", history)
    quality, error, rate = map(svg, figures)
    for drawn, words in (
        (quality, ("Quality of reconstructions", "PSNR (dB)", "step", "held-back pictures", ">100<", ">21.0<")),
        (error, ("Error of pixels", "mean error (% of black to white)", ">40<")),  # 50 times 0.8
        (rate, ("Learning rate",)),
    ):
        assert all(word in drawn for word in words), [word for word in words if word not in drawn]
    assert "Higher is better" in figures[0]
    assert charts("gpt", []) == []


def test_every_chart_is_explained() -> None:
    for chart in (*CHARTS["vqgan"], *CHARTS["gpt"]):
        assert chart.title
        assert chart.unit
        assert chart.meaning.endswith(".")
        assert all(chart.lines.values())


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    assert charts("gpt", history) == ["<p>Curves need Matplotlib, which script/setup installs.</p>"]


def test_grids_are_spread_evenly_over_the_steps() -> None:
    paths = [Path(f"{step:07d}.png") for step in (0, 10, 20, 30, 40, 200, 390, 400)]
    assert [int(path.stem) for path in evenly_spread(paths, 5)] == [0, 40, 200, 390, 400]
    assert evenly_spread(paths[:1], 5) == paths[:1]
    assert evenly_spread([], 5) == []


def plain(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (value, value, value)) for value in values]


def test_a_grid_is_read_as_it_was_saved(tmp_path: Path) -> None:
    save_grid([plain(10, 20), plain(30), plain(40, 50)], tmp_path / "grid.png", ["a", "“b” <c>", "d"])
    rows = read_grid(tmp_path / "grid.png")
    assert [(label, [int(np.array(one).mean()) for one in row]) for label, row in rows] == [
        ("a", [10, 20]),
        ("“b” <c>", [30]),
        ("d", [40, 50]),
    ]
    assert all(np.array(one).std() == 0 for _, row in rows for one in row)  # no gap between pictures
    Image.new("RGB", (20, 20)).save(tmp_path / "earlier.png")
    assert read_grid(tmp_path / "earlier.png") == []


def test_the_page_sets_each_picture_and_each_prompt_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "gpt" / "grids").mkdir(parents=True)
    for step, prompt in ((0, "a <star>"), (4, "a <star>"), (9, "a heart")):
        rows, labels = [plain(9, 9), plain(step, step), plain(1, 2, 3)], ["pictures", "drawn", prompt]
        save_grid(rows, tmp_path / "gpt" / "grids" / f"{step:07d}.png", labels)
    write_report(tmp_path / "report.html", tmp_path, record({"gpt": GPT}, sample_prompts="a heart"))
    page = (tmp_path / "report.html").read_text()
    heads = "<th>pictures</th><th>before training</th><th>step 4</th><th>step 9</th>"
    assert heads in page
    table = page[page.index(heads) : page.index("</table>", page.index(heads))]
    assert [row.count("<img") for row in table.split("<tr>")] == [0, 4, 4, 2]  # a prompt of the last grid: two drawings
    assert "“a heart”" in table
    assert "star" not in table
    assert "script/predict -e COG_WEIGHTS=weights.tar -i prompt=&#x27;a heart&#x27;" in page
    assert "Finished after 12.0 minutes." in page


def test_a_page_renews_itself_only_while_the_training_runs(tmp_path: Path) -> None:
    unfinished = record({"vqgan": {"steps": 3, "minutes": 0}}) | {"warnings": ["too <few> steps"]}
    for sentence, renews in (("Running: stage 1 of 2", True), ("Interrupted at step 3.", False), ("", False)):
        write_report(tmp_path / "report.html", tmp_path, unfinished, sentence)
        page = (tmp_path / "report.html").read_text()
        assert ("http-equiv=refresh" in page) == renews
        assert bool(re.search(r"Written at \d\d:\d\d:\d\d\.", page)) == renews
        assert sentence in page
        assert ("script/predict" in page) == (not sentence)
        assert "Warning: too &lt;few&gt; steps" in page


def test_the_page_names_the_first_thousand_of_many_skipped_files(tmp_path: Path) -> None:
    skipped = [{"name": f"{i:04}.txt", "reason": "a text file", "detail": ""} for i in range(1200)]
    many = record({})
    many["pictures"] |= {"skipped": skipped}
    write_report(tmp_path / "report.html", tmp_path, many)
    page = (tmp_path / "report.html").read_text()
    assert page.count("a text file") == 1000
    assert all(words in page for words in ("Skipped files: 1,200", "training.json names all", "0999.txt"))


def test_the_record_of_an_earlier_version_is_shown(tmp_path: Path) -> None:
    earlier = record({"vqgan": VQGAN, "gpt": {"steps": 7, "minutes": 1.0}})
    earlier["settings"] = {"stage": "both", "unknown": 3}
    del earlier["plan"]["transformer"]["muon_rate"], earlier["plan"]["model"]["bridge"]["mean_shift"]
    write_report(tmp_path / "report.html", tmp_path, earlier)
    assert "<td>unknown</td><td>3</td><td>3</td>" in (tmp_path / "report.html").read_text()


def test_a_training_that_has_no_stage_yet_has_a_record() -> None:
    assert record({})["settings"]["max_minutes"] == 0
