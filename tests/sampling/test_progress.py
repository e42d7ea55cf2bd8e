"""progress.py: the caller of a request hears how far it is and sees previews, and its tokens stay the same."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
import torch
from model_files import slow_folder
from PIL import Image, ImageChops

from clip_gen import ClipGen, Generation
from clip_gen.files import ROOT
from clip_gen.sampling.batch_sizes import max_candidates
from clip_gen.sampling.batcher import PREVIEW_SHARE
from clip_gen.sampling.progress import Progress, fill_unsampled

PROMPT = "a large red circle"
AT_ONCE = {"progress_seconds": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ClipGen:
    """Its pictures have 1024 tokens."""
    return ClipGen.load(slow_folder(tmp_path_factory.mktemp("models") / "slow"), "cpu")


def heard(model: ClipGen, **settings: object) -> tuple[Generation, list[Progress]]:
    reports: list[Progress] = []
    result = model.generate(PROMPT, **{"seed": 7, "candidates": 4} | settings, on_progress=reports.append)
    return result, reports


def test_the_caller_hears_how_many_tokens_are_sampled(model: ClipGen) -> None:
    result, reports = heard(model, **AT_ONCE)
    tokens = [report.tokens for report in reports]
    assert len(tokens) > 20
    assert tokens == sorted(tokens)
    assert all(count % 4 == 0 for count in tokens)
    assert {report.total_tokens for report in reports} == {4 * 1024}
    assert (tokens[0], tokens[-1]) == (4, 4 * 1024)
    seconds = [report.seconds for report in reports]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= result.metrics["sampling_seconds"]
    assert all(report.preview is None for report in reports)


def test_reports_have_the_interval_between_them(model: ClipGen) -> None:
    _, reports = heard(model, progress_seconds=0.2)
    between = [later.seconds - report.seconds for report, later in pairwise(reports[:-1])]
    assert between
    assert min(between) >= 0.2


def test_tokens_of_earlier_batches_count(tiny_model: ClipGen) -> None:
    count = 2 * max_candidates(tiny_model.gpt)
    _, reports = heard(tiny_model, candidates=count, **AT_ONCE)
    tokens = [report.tokens for report in reports]
    assert tokens == sorted(tokens)
    assert any(16 * count // 2 < many < 16 * count for many in tokens)
    assert tokens[-1] == 16 * count


def test_listening_and_previews_change_nothing(model: ClipGen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.sampling.batcher.PREVIEW_SHARE", 1.0)
    plain = model.generate(PROMPT, seed=7, candidates=4)
    watched, reports = heard(model, previews=True, **AT_ONCE)
    assert sum(report.preview is not None for report in reports) > 5
    assert torch.equal(watched.tokens, plain.tokens)
    assert watched.scores == plain.scores
    assert [image.tobytes() for image in watched.images] == [image.tobytes() for image in plain.images]


def test_a_preview_shows_the_sampled_part_and_is_gray_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.sampling.batcher.PREVIEW_SHARE", 1.0)
    shapes = ClipGen.load(ROOT / "checkpoints" / "shapes", "cpu")
    result, reports = heard(shapes, candidates=1, num_outputs=1, previews=True, **AT_ONCE)
    for report in (one for one in reports if one.preview is not None and one.tokens < 256):
        rows, more = divmod(report.tokens, 16)  # of tokens of 4 by 4 pixels
        finished = (0, 0, 64, max(0, 4 * (rows - 2)))  # the decoder looks at neighbours
        difference = ImageChops.difference(report.preview.crop(finished), result.images[0].crop(finished))
        assert not rows > 2 or max(brightest for _, brightest in difference.getextrema()) < 20
        below = report.preview.crop((0, 4 * (rows + (more > 0)), 64, 64))
        assert not below.height or below.getcolors() == [(64 * below.height, (128, 128, 128))]
    assert reports[-1].preview.tobytes() == result.images[0].tobytes()


def test_a_finished_candidate_is_the_preview_of_the_next_batch(
    tiny_model: ClipGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_gen.sampling.batcher.PREVIEW_SHARE", 1.0)
    count = max_candidates(tiny_model.gpt)
    first = tiny_model.generate(PROMPT, seed=7, candidates=count)
    _, reports = heard(tiny_model, candidates=2 * count, previews=True, **AT_ONCE)
    later = [one for one in reports if 16 * count < one.tokens < 32 * count and one.preview is not None]
    assert later
    assert later[-1].preview.tobytes() == first.images[0].tobytes()


def test_previews_take_a_small_share_of_the_time(model: ClipGen, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow a decoder is, and also of requests that are short: the time is counted."""
    preview, began, ended = ClipGen.preview, [], []

    def watched(*arguments: object) -> list[tuple[Image.Image, float]]:
        began.append(time.thread_time())
        preview(*arguments)
        pictures = preview(*arguments)
        ended.append(time.thread_time())
        return pictures

    monkeypatch.setattr(ClipGen, "preview", watched)
    for candidates in (16, 1, 1, 1, 16):
        heard(model, candidates=candidates, num_outputs=1, previews=True, **AT_ONCE)
    # Not strict: nothing begins after the last preview.
    shares = [(end - start) / (later - start) for start, end, later in zip(began, ended, began[1:], strict=False)]
    assert len(shares) > 1
    assert max(shares) < 1.2 * PREVIEW_SHARE


def test_the_function_runs_in_the_callers_thread_and_may_be_slow(model: ClipGen) -> None:
    threads, reports = [], []

    def slow(progress: Progress) -> None:
        threads.append(threading.current_thread())
        reports.append(progress)
        time.sleep(0.3)

    result = model.generate(PROMPT, seed=7, candidates=4, on_progress=slow, **AT_ONCE)
    assert set(threads) == {threading.current_thread()}
    assert len(reports) < 4 + result.metrics["sampling_seconds"] / 0.3  # reports do not wait in a queue


def test_an_error_of_the_function_ends_its_request_only(model: ClipGen) -> None:
    def broken(progress: Progress) -> None:
        raise ZeroDivisionError("by the caller")

    with pytest.raises(ZeroDivisionError, match="by the caller"):
        model.generate(PROMPT, candidates=256, on_progress=broken)
    started = time.monotonic()
    assert len(model.generate(PROMPT, candidates=1, num_outputs=1).images) == 1
    assert time.monotonic() - started < 10  # the 256 others would take longer


def test_missing_tokens_are_those_above_and_in_the_first_row_those_to_the_left() -> None:
    tokens = torch.tensor([[5, 6, -1, -1, -1, -1, -1, -1, -1], [5, 6, 7, 8, -1, -1, 1, -1, -1]])
    assert fill_unsampled(tokens, 3).tolist() == [[5, 6, 6, 5, 6, 6, 5, 6, 6], [5, 6, 7, 8, 6, 7, 1, 6, 7]]
