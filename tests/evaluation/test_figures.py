"""evaluation/figures.py and report.py: tables, the page, and two evaluations side by side."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from clip_gen.__main__ import main
from clip_gen.evaluation.figures import Figure, as_json, as_markdown, as_text, differences, read_report
from clip_gen.metrics.intervals import Estimate

FID = Figure("from prompts", "FID", 20.0, 19.0, 21.0, "InceptionV3", 30000, 30000)


def test_a_difference_counts_if_it_exceeds_both_intervals_together() -> None:
    for value, sentence in (
        (18.5, "+1.50, worse"),
        (18.7, "+1.30, within the intervals"),
        (30.0, "-10.00, better"),
    ):
        other = replace(FID, value=value, low=value - 1, high=value + 1)
        assert differences([FID], [other])[0].shown == sentence
    recall = Figure("from prompts", "recall", 0.5, 0.49, 0.51, "InceptionV3", 30000, 30000)
    other = replace(recall, value=0.4, low=0.39, high=0.41)
    assert differences([recall], [other])[0].shown == "+10.0 points, better"


def test_figures_that_do_not_compare_are_said_to_be() -> None:
    assert differences([FID], [replace(FID, features="CLIP")])[0].shown == "do not compare: InceptionV3, CLIP"
    assert differences([FID], [replace(FID, low=None)])[0].shown == "0.00, without an interval"
    assert differences([FID], [replace(FID, source="reconstructions")]) == []


@pytest.mark.parametrize(
    ("own", "other", "different", "sentence"),
    [
        ({"weights": "1"}, {"weights": "2"}, [], "InceptionV3 with other weights"),
        ({"weights": "1"}, {"weights": "1", "features": "CLIP of base"}, [], ""),
        ({}, {"pictures": 60}, [], "30,000 against 30,000 and 60 against 30,000 pictures"),
        ({}, {}, ["images"], "other real pictures"),
        ({}, {}, ["training"], ""),
        ({}, {}, ["prompts"], "other prompts"),
        ({"source": "from image embeddings"}, {"source": "from image embeddings"}, ["prompts"], ""),
        ({"name": "KID × 1000"}, {"name": "KID × 1000", "pictures": 60}, [], ""),
        ({"name": "CLIP score", "real": 0}, {"name": "CLIP score", "real": 0}, ["images"], ""),
        (
            {"name": "close to a training picture"},
            {"name": "close to a training picture"},
            ["images", "training"],
            "other training pictures",
        ),
    ],
)
def test_only_like_is_compared_with_like(own: dict, other: dict, different: list[str], sentence: str) -> None:
    """A FID is higher for fewer pictures, and models with the same CLIP may have any names."""
    [found] = differences([replace(FID, **own)], [replace(FID, **other)], different)
    assert found.obstacle == sentence
    assert (found.exceeds is None) == bool(sentence)


def test_reports_are_read_back_and_other_files_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(as_json([FID], {"model": "a"}))
    assert read_report(path) == ({"model": "a"}, [FID])
    figures = json.loads(path.read_text())["figures"]
    for text in (
        '{"rows": {}}',
        '{"figures": []}',
        json.dumps({"figures": [figures[0] | {"value": "20"}]}),
        json.dumps({"figures": [figures[0] | {"low": []}]}),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not the report of an evaluation on pictures"):
            read_report(path)


def test_tables_name_features_counts_and_intervals() -> None:
    without = Figure.of("from prompts", "precision", Estimate(0.5, float("nan"), float("nan")), "CLIP", 9, 10, "few")
    table = as_markdown("A model", [FID, without])
    assert "| from prompts | FID ↓ | 20.00 | 19.00 to 21.00 | 30,000 against 30,000 | InceptionV3 |  |" in table
    assert "| from prompts | precision ↑ | 50.0 % | none | 9 against 10 | CLIP | few |" in table
    assert "from prompts, FID            20.00  (19.00 to 21.00)  30,000 against 30,000; InceptionV3" in as_text(
        [FID, without]
    )


def test_the_page_needs_no_other_file_and_shows_the_comparison(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shapes", "--count", "12", "--seed", "3", "--out", str(tmp_path / "real")]) == 0
    (tmp_path / "prompts.txt").write_text("a <b>bold</b> star\na ring\na heart\na cross\na square")
    words = ["evaluate", str(tiny_model_folder), "--images", str(tmp_path / "real"), "--count", "8"]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--out"]
    assert main([*words, str(tmp_path / "first")]) == 0
    assert main(["shapes", "--count", "9", "--seed", "4", "--out", str(tmp_path / "training")]) == 0
    compare = ["--seed", "9", "--compare", str(tmp_path / "first" / "report.json")]
    compare += ["--training", str(tmp_path / "training")]
    assert main([*words, str(tmp_path / "second"), *compare]) == 0
    assert "tiny beside tiny:" in capsys.readouterr().out
    page = (tmp_path / "second" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{20})', page)
    assert sources
    assert set(sources) == {"data:image/webp;base64"[:20]}
    titles = [
        "Samples",
        "Figures",
        "Beside tiny",
        "Samples, and those of tiny",
        "Hardest prompts, by CLIP score",
        "Reconstructions",
        "Settings and versions",
    ]
    assert [title for title in re.findall("<h2>(.*?)</h2>", page) if title in titles] == titles
    assert "a &lt;b&gt;bold&lt;/b&gt; star" in page
    assert "<b>bold</b>" not in page
    report = json.loads((tmp_path / "second" / "report.json").read_text())
    assert {f["real"] for f in report["figures"] if f["name"] == "close to a training picture"} == {9}
    closest = [one["distance"] for one in report["closest"]["from prompts"]]
    assert len(closest) == 5
    assert closest == sorted(closest)
    assert f"{closest[0]:.2f} of the usual distance" in page
    hardest = report["hardest_prompts"]
    assert len(hardest) == 2
    assert hardest[0]["clip_score"] <= hardest[1]["clip_score"]
