"""The predictor in this process, its models and its files.

Traps of Cog 0.23.1 in these tests: 14 (numbers of another type), 18 (no schema, no checks). The others: test_serve.py,
test_openapi.py.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import re
import shutil
import socket
import tarfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from model_files import other_folder, slow_folder
from PIL import Image

from clip_gen.pipeline import ClipGen, Generation, Stopped
from clip_gen.sampling.batch_sizes import max_candidates
from clip_gen.serving.inputs import InputError
from clip_gen.serving.model_cache import Models
from clip_gen.serving.outputs import Outputs
from clip_gen.serving.request_weights import BusyError, RefusedWeightsError, RequestRules
from clip_gen.serving.slots import Slots, max_prediction_seconds, remove_prediction_folders
from clip_gen.weights.cache import Cache, WeightsFolder
from clip_gen.weights.model_folder import ModelFolderError
from clip_gen.weights.tarball import pack
from predict import Predictor

QUICK = {
    **{"prompt": "a large red circle", "num_outputs": 2, "candidates": 4, "clip_rerank": True, "seed": 7},
    **{"image": None, "image_weight": 0.5, "negative_prompt": "", "init_image": None, "mask": None},
    **{"top_k": 0, "top_p": 1.0, "temperature": 1.0, "guidance": 1.0},
    **{
        "output_format": "png",
        "output_quality": 90,
        "output_size": "1x",
        "output_grid": False,
        "output_metadata": True,
        "replicate_weights": None,
    },
}


@pytest.fixture(scope="module")
def predictor(tiny_model_folder: Path) -> Predictor:
    predictor = Predictor()
    asyncio.run(predictor.setup(str(tiny_model_folder)))
    return predictor


def get(models: Models, weights: str | None) -> ClipGen:
    """The model of a request; weights on this disk are allowed."""
    models.rules = RequestRules("any")
    return asyncio.run(models.get(weights, lambda: False))


def predict(predictor: Predictor, **inputs: object) -> list[Path]:
    return asyncio.run(predictor.run(**(QUICK | inputs)))


def test_the_log_says_which_model_runs(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(Predictor().setup(str(tiny_model_folder)))
    loading, model, loaded = capsys.readouterr().out.splitlines()
    assert loading == f"loading {tiny_model_folder}: COG_WEIGHTS names it"
    assert model == f"model: tiny from {tiny_model_folder} on cpu: COG_WEIGHTS names it"
    megabytes = r"clip \d\.\d MB, vqgan \d\.\d MB, gpt \d\.\d MB"
    assert re.fullmatch(rf"loaded: {megabytes} in \d+\.\d seconds; the setup took \d+\.\d seconds", loaded)


def test_the_log_contains_the_random_seed(predictor: Predictor, capsys: pytest.CaptureFixture[str]) -> None:
    first = predict(predictor, seed=None)
    seed = int(capsys.readouterr().out.split("seed: ")[1].splitlines()[0])
    again = predict(predictor, seed=seed)
    assert [Image.open(path).tobytes() for path in first] == [Image.open(path).tobytes() for path in again]


def test_a_missing_model_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="absent"):
        asyncio.run(Predictor().setup(str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"num_outputs": 65}, "num_outputs is 65; give a whole number, 1 to 64"),
        ({"num_outputs": 2.5}, "num_outputs is 2.5; give a whole number, 1 to 64"),
        ({"num_outputs": True}, "num_outputs is true; give a whole number, 1 to 64"),
        ({"num_outputs": None}, "num_outputs is missing; give a whole number, 1 to 64"),
        ({"candidates": "many"}, 'candidates is "many"; give a whole number, 1 to 256'),
        ({"temperature": float("nan")}, "temperature is nan; give a number, 0 to 10"),
        ({"seed": float(2**70)}, f"seed is {2**70}; give a whole number, 0 to 2147483647"),
        ({"output_format": "gif"}, 'output_format is "gif"; give one of png, webp, jpg'),
        ({"output_quality": 101}, "output_quality is 101; give a whole number, 0 to 100"),
        ({"prompt": "x" * 1001}, f'prompt is "{"x" * 97}..."; give 0 to 1000 characters'),
        ({"image": "/etc/hostname"}, 'image is "/etc/hostname"; give a file'),
        ({"image_weight": 1.5}, "image_weight is 1.5; give a number, 0 to 1"),
        ({"clip_rerank": "yes"}, 'clip_rerank is "yes"; give true or false'),
        ({"replicate_weights": 5}, "replicate_weights is 5; give text"),
    ],
)
def test_an_invalid_input_that_cog_accepts_is_refused(
    predictor: Predictor, inputs: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError) as error:
        predict(predictor, **inputs)
    assert str(error.value) == sentence


def test_a_contact_sheet_comes_first_and_counts_as_no_picture(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: dict[str, object] = {}
    monkeypatch.setattr(predictor, "record_metric", recorded.__setitem__)
    paths = predict(predictor, output_grid=True)
    assert [path.name for path in paths] == ["out-grid.png", "out-0.png", "out-1.png"]
    sheet, first = Image.open(paths[0]), Image.open(paths[1])
    assert sheet.crop((4, 4, 20, 20)).tobytes() == first.tobytes()
    assert recorded["image_output_count"] == 2


def test_output_size_enlarges_the_pictures(predictor: Predictor) -> None:
    own, large = ([Image.open(path) for path in predict(predictor, output_size=size)] for size in ("1x", "4x"))
    assert [picture.size for picture in large] == [(64, 64)] * 2
    for small, big in zip(own, large, strict=True):
        assert big.tobytes() == small.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
        assert big.text["output_size"] == "4x"


@pytest.mark.usefixtures("upscaler")
def test_the_log_says_that_a_pulled_upscaler_enlarges(predictor: Predictor, capsys: pytest.CaptureFixture[str]) -> None:
    predict(predictor, output_size="2x")
    assert "output_size is 2x: Real-ESRGAN enlarges the pictures\n" in capsys.readouterr().out


def test_whole_floats_are_accepted_as_ints_and_ints_as_floats(predictor: Predictor) -> None:
    paths = predict(predictor, num_outputs=2.0, candidates=4.0, seed=7.0, guidance=2, output_quality=90.0)
    assert [path.name for path in paths] == ["out-0.png", "out-1.png"]


class Watched(ClipGen):
    """Counts the running and the stopped generations, and keeps the results of the others."""

    under_way, stopped = 0, 0

    def __init__(self, *inputs: object):
        super().__init__(*inputs)
        self.gate, self.made = threading.Barrier(1), []

    def generate(self, *inputs: object, **named: object) -> Generation:
        self.under_way += 1
        self.gate.wait(30)
        try:
            found = super().generate(*inputs, **named)
            self.made.append(found)
            return found
        except Stopped:
            self.stopped += 1
            raise
        finally:
            self.under_way -= 1


def test_a_cancelled_prediction_stops_sampling(tmp_path: Path) -> None:
    async def cancel_early() -> int:
        predictor = Predictor()
        await predictor.setup(str(folder := slow_folder(tmp_path / "slow")))
        predictor.models.own = model = Watched.load(folder)
        task = asyncio.create_task(predictor.run(**(QUICK | {"candidates": 256})))
        while not model.under_way:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        predictor.drawing.shutdown()  # waits for the thread that draws
        return model.stopped

    assert asyncio.run(cancel_early()) == 1


def test_the_next_prediction_runs_after_cancelled_ones(tmp_path: Path) -> None:
    async def cancel_and_go_on() -> list[Path]:
        predictor = Predictor()
        await predictor.setup(str(slow_folder(tmp_path / "slow")))
        first = asyncio.create_task(predictor.run(**(QUICK | {"candidates": 256})))
        waiting = asyncio.create_task(predictor.run(**(QUICK | {"candidates": 256})))
        await asyncio.sleep(0.2)
        first.cancel()
        waiting.cancel()
        return await asyncio.wait_for(predictor.run(**QUICK), timeout=60)

    assert len(asyncio.run(cancel_and_go_on())) == 2


def test_cancelled_downloads_from_a_silent_host_block_no_prediction(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancel_eight_and_go_on(url: str) -> list[Path]:
        predictor = Predictor()
        await predictor.setup(str(tiny_model_folder))
        for _ in range(8):
            task = asyncio.create_task(predictor.run(**(QUICK | {"replicate_weights": url})))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await asyncio.wait_for(predictor.run(**QUICK), timeout=20)

    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path))
    monkeypatch.setenv("CLIP_GEN_ALLOW_WEIGHTS", "any")
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.tar"
        assert len(asyncio.run(cancel_eight_and_go_on(address))) == 2


def test_running_downloads_block_no_other_prediction(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask_beside_eight(url: str) -> list[Path]:
        predictor = Predictor()
        await predictor.setup(str(tiny_model_folder))
        tasks = [asyncio.create_task(predictor.run(**(QUICK | {"replicate_weights": url}))) for _ in range(8)]
        await asyncio.sleep(0.5)
        try:
            return await asyncio.wait_for(predictor.run(**QUICK), timeout=20)
        finally:
            for task in tasks:
                task.cancel()

    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path))
    monkeypatch.setenv("CLIP_GEN_ALLOW_WEIGHTS", "any")
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.tar"
        assert len(asyncio.run(ask_beside_eight(address))) == 2


def test_simultaneous_predictions_share_batches_and_get_the_same_bytes(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WAIT_SECONDS", "MAX_WAIT_SECONDS"):
        monkeypatch.setattr(f"clip_gen.sampling.batcher.{name}", 1.0)  # however busy the machine
    alone = Predictor()
    asyncio.run(alone.setup(str(tiny_model_folder)))
    expected = [[path.read_bytes() for path in predict(alone, seed=seed)] for seed in range(8)]

    async def eight_at_once() -> tuple[list[list[bytes]], list[Generation]]:
        predictor = Predictor()
        await predictor.setup(str(tiny_model_folder))
        predictor.models.own = Watched.load(tiny_model_folder)
        predictor.models.own.gate = threading.Barrier(8)
        found = await asyncio.gather(*(predictor.run(**(QUICK | {"seed": seed})) for seed in range(8)))
        return [[path.read_bytes() for path in paths] for paths in found], predictor.models.own.made

    found, made = asyncio.run(eight_at_once())
    assert found == expected
    # 32 candidates in one batch, or in two of 16 where that is what a batch holds here.
    full = max_candidates(alone.models.own.gpt)
    assert [generation.metrics["rows_in_batch"] for generation in made] == [full] * 8


def test_a_prediction_over_the_time_limit_fails_and_frees_the_model(tmp_path: Path) -> None:
    async def wait_for_the_end() -> int:
        predictor = Predictor()
        await predictor.setup(str(folder := slow_folder(tmp_path / "slow")))
        predictor.models.own, predictor.slots = Watched.load(folder), Slots(0.5)
        with pytest.raises(TimeoutError, match=r"the prediction took longer than 0\.5 seconds; ask for fewer"):
            await predictor.run(**(QUICK | {"candidates": 256}))
        predictor.drawing.shutdown()  # waits for the thread that draws
        return predictor.models.own.stopped

    assert asyncio.run(wait_for_the_end()) == 1


def test_the_time_limit_of_a_prediction_is_set_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max_prediction_seconds() == 1800
    monkeypatch.setenv("CLIP_GEN_MAX_SECONDS", "90.5")
    assert max_prediction_seconds() == 90.5
    for text in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("CLIP_GEN_MAX_SECONDS", text)
        with pytest.raises(ValueError, match=f"CLIP_GEN_MAX_SECONDS is {text}; give a number of seconds, 1 or more"):
            max_prediction_seconds()


def test_only_the_empty_folders_of_a_prediction_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.serving.slots.PREDICTIONS", root := tmp_path / "predictions")
    for name in ("done", "full", "a/b", "a/c", "../outside", "."):
        for part in ("inputs", "outputs"):
            (root / name / part).mkdir(parents=True)
    (root / "full" / "outputs" / "0.png").touch()
    for name in ("done", "full", "a/b", "absent", "../outside", "..", ".", str(tmp_path / "outside")):
        remove_prediction_folders(name)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [
        *("outside", "outside/inputs", "outside/outputs"),
        *("predictions", "predictions/a", "predictions/a/c", "predictions/a/c/inputs", "predictions/a/c/outputs"),
        *("predictions/full", "predictions/full/outputs", "predictions/full/outputs/0.png"),
        *("predictions/inputs", "predictions/outputs"),
    ]


def test_only_the_newest_folders_of_pictures_are_kept(tiny_model: ClipGen, tmp_path: Path) -> None:
    outputs, generation = Outputs(tmp_path, kept=3), tiny_model.generate("a star", candidates=1, num_outputs=1, seed=1)
    paths = [outputs.save(generation, {}, "png", 90)[0] for _ in range(8)]
    assert [path.exists() for path in paths] == [False] * 5 + [True] * 3
    assert len(list(tmp_path.iterdir())) == 3


def test_pictures_that_cannot_be_saved_leave_no_files(tiny_model: ClipGen, tmp_path: Path) -> None:
    outputs, generation = Outputs(tmp_path), tiny_model.generate("a star", candidates=2, num_outputs=2, seed=1)
    with pytest.raises(ValueError, match="bmp"):
        outputs.save(generation, {}, "bmp", 90)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_pictures_are_saved_after_their_folder_was_removed(tiny_model: ClipGen, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "outputs")
    generation = tiny_model.generate("a star", candidates=1, num_outputs=1, seed=1)
    outputs.save(generation, {}, "png", 90)
    shutil.rmtree(tmp_path / "outputs")
    assert outputs.save(generation, {}, "png", 90)[0].is_file()


@pytest.mark.parametrize("weights", [None, ""])
def test_no_weights_mean_the_servers_own_model(tiny_model_folder: Path, weights: str | None) -> None:
    models = Models(str(tiny_model_folder))
    assert get(models, weights) is models.own


def test_the_same_weights_are_loaded_once(tiny_model_folder: Path, tmp_path: Path) -> None:
    models, other = Models(str(tiny_model_folder)), str(other_folder(tmp_path / "other"))
    found = in_threads(lambda: get(models, other), 4)
    assert len({id(model) for model in found}) == 1
    assert found[0] is not models.own


def test_slow_loading_does_not_block_loaded_models(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(str(tiny_model_folder))
    quick, slow = str(other_folder(tmp_path / "quick")), other_folder(tmp_path / "slow")
    known, load, may_end = get(models, quick), ClipGen.load, threading.Event()

    def loaded(source: WeightsFolder) -> ClipGen:
        assert source.path != slow or may_end.wait(60)
        return load(source)

    monkeypatch.setattr(ClipGen, "load", loaded)
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(get, models, str(slow))
        assert pool.submit(get, models, quick).result(30) is known
        assert not loading.done()
        may_end.set()
        assert loading.result(60) is get(models, str(slow))


def test_weights_that_failed_to_load_are_loaded_again(tiny_model_folder: Path, tmp_path: Path) -> None:
    models, folder = Models(str(tiny_model_folder)), other_folder(tmp_path / "other")
    whole = (folder / "gpt.safetensors").read_bytes()
    times = (folder / "config.yaml").stat()
    (folder / "gpt.safetensors").write_bytes(whole[:-100])
    os.utime(folder / "gpt.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="damaged"):
        get(models, str(folder))
    (folder / "gpt.safetensors").write_bytes(whole)
    os.utime(folder / "gpt.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert get(models, str(folder)) is get(models, str(folder))


def test_the_least_recently_used_model_is_evicted(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    models = Models(str(tiny_model_folder), max_others=2)
    folder = other_folder(tmp_path / "other")
    tars = [str(tmp_path / f"{i}.tar") for i in range(3)]
    for tar in tars:
        pack(folder, tar)
    first, second = (weakref.ref(get(models, tar)) for tar in tars[:2])
    get(models, tars[0])
    get(models, tars[2])
    assert get(models, tars[0]) is first()
    assert second() is None


def test_models_in_use_count_towards_the_limit(tiny_model_folder: Path, tmp_path: Path) -> None:
    models = Models(str(tiny_model_folder), max_others=1, wait_seconds=0.3)
    models.rules = RequestRules("any")
    first, second = (str(other_folder(tmp_path / name)) for name in ("first", "second"))

    async def ask_for_both() -> weakref.ref[ClipGen]:
        model = await models.get(first, lambda: False)
        assert await models.get(first, lambda: False) is model
        with pytest.raises(BusyError, match=r"^the server is busy with other weights; try again later$"):
            await models.get(second, lambda: False)
        waiting = asyncio.create_task(models.get(second, lambda: False))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        found = weakref.ref(model)
        model.itself = model  # as the error of a failed prediction keeps it, until a garbage collection
        del model
        await waiting
        return found

    assert asyncio.run(ask_for_both())() is None


def test_loading_models_count_towards_the_limit_and_are_evicted_if_unused(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(str(tiny_model_folder), max_others=1, wait_seconds=0.3)
    first, second = (str(other_folder(tmp_path / name)) for name in ("first", "second"))
    load, loading, may_end = ClipGen.load, threading.Event(), threading.Event()

    def slow_load(source: WeightsFolder) -> ClipGen:
        loading.set()
        assert may_end.wait(60)
        return load(source)

    async def cancel_the_first() -> None:
        task = asyncio.create_task(models.get(first, lambda: False))
        await asyncio.to_thread(loading.wait, 60)
        with pytest.raises(BusyError):
            await models.get(second, lambda: False)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    models.rules = RequestRules("any")
    monkeypatch.setattr(ClipGen, "load", slow_load)
    asyncio.run(cancel_the_first())
    may_end.set()
    models._wait_seconds = 60
    assert get(models, second).config.name == "tiny"


def test_errors_name_weights_by_their_url(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    (folder := other_folder(tmp_path / "other")).joinpath("gpt.safetensors").write_bytes(b"damaged")
    with tarfile.open(tmp_path / "weights.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=".")
    url = "data:;base64," + base64.b64encode((tmp_path / "weights.tar.gz").read_bytes()).decode()
    gc.collect()
    gc.disable()  # what only the garbage collector frees would keep the folder in use for long
    try:
        with pytest.raises(ModelFolderError, match=r"^data:;base64,.*\.\.\./gpt\.safetensors: damaged") as error:
            predict(predictor, replicate_weights=url)
        assert str(tmp_path) not in str(error.value)
        del error
        monkeypatch.setenv("CLIP_GEN_CACHE_GB", "0")
        assert not Cache().make_room(1)
        assert [path.name for path in (tmp_path / "cache" / "weights").iterdir()] == [".lock"]
    finally:
        gc.enable()


def test_a_request_cannot_name_a_file_of_the_server(predictor: Predictor, tiny_model_folder: Path) -> None:
    with pytest.raises(RefusedWeightsError):
        predict(predictor, replicate_weights=str(tiny_model_folder))


def test_a_folder_with_newer_files_is_loaded_again(tiny_model_folder: Path, tmp_path: Path) -> None:
    models, folder = Models(str(tiny_model_folder)), other_folder(tmp_path / "other")
    before = get(models, str(folder))
    time.sleep(0.01)
    other_folder(folder)
    assert get(models, str(folder)) is not before


def in_threads(work: Callable[[], ClipGen], count: int) -> list[ClipGen]:
    found: list[ClipGen] = []
    threads = [threading.Thread(target=lambda: found.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
