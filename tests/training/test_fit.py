"""training/fit.py: stages at toy size that are interrupted or short of memory, disk or time."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_networks
from PIL import Image
from pytorch_lightning.callbacks import Callback

from clip_gen.files import PARTIAL
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training import fit as fit_module
from clip_gen.training import progress
from clip_gen.training import stage as stage_module
from clip_gen.training.callbacks import History, read_history
from clip_gen.training.checkpoints import find_checkpoint, read_checkpoint
from clip_gen.training.datasets import EncodedPictures, Endless
from clip_gen.training.encoding import encode_once, save_array
from clip_gen.training.fit import Machine, fit
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.grids import Grids, ReconstructionGrids, read_grid
from clip_gen.training.live_report import LiveReport
from clip_gen.training.minutes import Minutes
from clip_gen.training.stage import FitConfig, Stage
from clip_gen.training.vqgan_trainer import VQGANLoss, VQGANTrainer
from clip_gen.weights.model_folder import save_part
from clip_gen.worlds.shapes.pairs import RenderedPictures

CONFIG = FitConfig(steps=9, batch_size=8, warmup=2, ema_decay=0.5, validate_every=4)


SAVING = Machine(save_seconds=0)


class Cut(Exception):
    """Interrupts a training."""


class CutAfter(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: object, *_: object) -> None:
        if trainer.global_step == self.step:
            raise Cut


def stage_1(config: FitConfig) -> VQGANTrainer:
    torch.manual_seed(0)
    loss = VQGANLoss(perceptual=0.1, adversarial=0.1, adversarial_from=0.33)
    return VQGANTrainer(VQGAN(TINY.vqgan).train(), replace(config, muon_rate=2e-3), loss, tiny_networks().clip)


def stage_2(config: FitConfig) -> GPTTrainer:
    torch.manual_seed(0)
    return GPTTrainer(GPT(TINY.gpt).train(), replace(config, muon_rate=3e-3))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> EncodedPictures:
    folder, networks, pictures = tmp_path_factory.mktemp("encoded"), tiny_networks(), RenderedPictures(24, 1, 16)
    embeddings, tokens = folder / "embeddings.npy", folder / "tokens.npy"
    encode_once(pictures, {embeddings: networks.clip, tokens: networks.vqgan})
    return EncodedPictures(embeddings, tokens, noise=0.5, dropout=0.1)


@pytest.fixture(params=["vqgan", "gpt"])
def train(request: pytest.FixtureRequest, encoded: EncodedPictures) -> Callable[..., Stage]:
    """Trains a stage of either kind in a folder and returns it; cut: the step at which it is interrupted."""

    def trained(folder: Path, config: FitConfig = CONFIG, cut: int | None = None, **options: object) -> Stage:
        pictures = RenderedPictures(1000, 0, 16)
        samples, held_back = {
            "vqgan": (pictures, RenderedPictures(8, 2, 16)),
            "gpt": (Endless(encoded, 3), encoded),
        }[request.param]
        stage = {"vqgan": stage_1, "gpt": stage_2}[request.param](config)
        options.setdefault("machine", SAVING)
        options["callbacks"] = [*options.get("callbacks", ()), *([CutAfter(cut)] if cut else [])]
        stage.record = fit("toy", stage, samples, held_back, folder, seed=4, **options)
        return stage

    return trained


def test_a_stage_interrupted_twice_ends_with_the_same_weights(train: Callable, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    for cut in (3, 7):
        with pytest.raises(Cut):
            train(tmp_path / "cut", cut=cut)
    resumed = train(tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert read_history(tmp_path / "whole" / "history.jsonl") == read_history(tmp_path / "cut" / "history.jsonl")
    starts = [(start["from_step"], start["to_step"]) for start in resumed.record["starts"]]
    assert starts in ([(0, 3), (3, 7), (7, 9)], [(0, 2), (2, 6), (6, 9)]), starts


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_the_record_has_all_steps_of_a_stage_begun_by_an_earlier_version(train: Callable, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(tmp_path, cut=3)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["starts"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    starts = train(tmp_path).record["starts"]
    assert [(start["from_step"], start["to_step"]) for start in starts] == [(0, 9)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_two_threads_train_the_same_compiled_transformer_every_time(tmp_path: Path) -> None:
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    np.save(tmp_path / "embeddings.npy", rng.standard_normal((64, 16), np.float32).astype(np.float16))
    np.save(tmp_path / "tokens.npy", rng.integers(64, size=(64, 64), dtype=np.uint16))
    encoded = EncodedPictures(tmp_path / "embeddings.npy", tmp_path / "tokens.npy", places=32)
    gpt = replace(TINY.gpt, n_embd=64, block_size=64, codebook_size=64, rotary=True, neighbour_context=True)

    def trained(folder: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        trainer = GPTTrainer(GPT(gpt).train(), replace(CONFIG, steps=4, batch_size=64, compile=True))
        fit("toy", trainer, Endless(encoded, 3), encoded, folder, seed=4)
        return trainer.state_dict()

    torch.set_num_threads(2)
    try:
        first, second = trained(tmp_path / "first"), trained(tmp_path / "second")
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_stage_that_began_on_a_gpu_resumes_without_one(
    encoded: EncodedPictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*callbacks: Callback) -> GPTTrainer:
        stage, samples = stage_2(replace(CONFIG, patience=9)), Endless(encoded, 3)
        fit("toy", stage, samples, encoded, tmp_path, seed=4, machine=SAVING, callbacks=callbacks)
        return stage

    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as in checkpoints of a GPU
    with pytest.raises(Cut):
        trained(CutAfter(7))
    ended = trained()
    assert find_checkpoint(tmp_path).steps == 9
    assert (tmp_path / "best.ckpt").is_file()
    again = trained()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ended.state_dict().items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="Lightning refuses fsdp only where there is no GPU")
@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_a_strategy_that_this_machine_does_not_support_is_one_clear_error(train: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'cannot train with devices auto, nodes 1 and strategy "fsdp" \(.*; give'):
        train(tmp_path, machine=Machine(strategy="fsdp"))


class Watched(Callback):
    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: object, stage: Stage, *_: object) -> None:
        self.seen.append(next(iter(stage.parameters())).detach().clone())


@pytest.mark.parametrize(("decay", "last"), [(0.999, 9 / 18), (0.3, 0.7)])
def test_the_average_covers_the_last_ninth_of_the_steps_at_first(
    train: Callable, tmp_path: Path, decay: float, last: float
) -> None:
    watched = Watched()
    stage = train(tmp_path, replace(CONFIG, ema_decay=decay), callbacks=[watched])
    mean = watched.seen[0]
    for n, weights in enumerate(watched.seen[1:], 1):
        mean = mean.lerp(weights, max(9 / (10 + n), 1 - decay))
    assert len(watched.seen) == 9
    assert max(9 / (10 + n), 1 - decay) == pytest.approx(last)
    assert torch.allclose(next(iter(stage.parameters())), mean, atol=1e-7)


def test_processes_of_torchrun_that_lightning_would_not_use_are_refused(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun started 2 processes, but devices and nodes make 1; give --devices"):
        train(tmp_path)


def test_history_has_every_step_once_with_its_losses(train: Callable, tmp_path: Path) -> None:
    train(tmp_path)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 1')  # as after a power failure
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 10))
    assert [entry["step"] for entry in history if "val_psnr" in entry or "val_loss" in entry] == [4, 8]
    assert all(np.isfinite(value) for entry in history for value in entry.values())


def test_a_time_limit_ends_a_stage_with_a_checkpoint(
    train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.Progress.__init__, "__defaults__", (0.0, 0.1))  # seconds between lines
    with caplog.at_level(logging.INFO):
        stage = train(tmp_path, replace(CONFIG, steps=100_000), machine=Machine(max_minutes=1 / 60))
    steps = stage.record["steps"]
    assert 1 <= steps < 100_000
    assert stage.record["ended_by"] == "time"
    assert any("minutes are over at step" in line for line in caplog.messages)
    assert find_checkpoint(tmp_path).steps == steps
    assert [start["to_step"] for start in stage.record["starts"]] == [steps]
    *earlier, last = [line for line in caplog.messages if line.startswith("toy ")]
    ends = [
        re.search(r" min left, until about step (\d+)  learning rate [\d.e-]+  loss ", line) for line in earlier[1:]
    ]
    assert earlier
    assert all(end and steps / 5 < int(end[1]) < 5 * steps for end in ends), earlier
    assert "  0.0 min left  learning rate " in last


class Sketches(Grids):
    """Grids of a plain picture that takes so many seconds to draw."""

    def __init__(self, folder: Path, seconds: float):
        super().__init__(folder)
        self.seconds = seconds

    labels = ("plain",)

    def rows(self, module: Stage) -> list[list[Image.Image]]:
        time.sleep(self.seconds)
        return [[Image.new("RGB", (8, 8))]]


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 4, 11), (0.2, 2, 3)])
def test_a_stage_with_a_time_limit_draws_grids_until_its_end(
    train: Callable, tmp_path: Path, seconds: float, least: int, most: int
) -> None:
    limited = {"machine": Machine(max_minutes=3 / 60), "callbacks": [Sketches(tmp_path, seconds)]}
    stage = train(tmp_path, replace(CONFIG, steps=100_000), **limited)
    drawn = sorted(int(path.stem) for path in (tmp_path / "grids").iterdir())
    assert least <= len(drawn) <= most  # fewer if drawing is slow
    assert drawn[0] == 0  # before training
    assert drawn[-1] == stage.record["steps"]


@pytest.mark.parametrize("train", ["vqgan"], indirect=True)
def test_the_grid_before_training_leaves_a_new_codebook_as_it_is(train: Callable, tmp_path: Path) -> None:
    """A new codebook is made from the first batch that it sees, which must be one of the training."""
    pictures = RenderedPictures(8, 2, 16)
    with_grids = train(tmp_path / "with", callbacks=[ReconstructionGrids(pictures, tmp_path / "with")])
    without = train(tmp_path / "without")
    for name, value in without.state_dict().items():
        assert torch.equal(value, with_grids.state_dict()[name]), name
    before, after = (read_grid(tmp_path / "with" / "grids" / name) for name in ("0000000.png", "0000009.png"))
    assert [label for label, _ in before] == ["held-back pictures", "what the VQGAN makes of them"]
    assert [len(row) for _, row in before] == [8, 8]
    assert before[0][1][3].tobytes() == after[0][1][3].tobytes()  # the same picture
    assert before[1][1][3].tobytes() != after[1][1][3].tobytes()


def test_a_terminal_shows_progress_on_one_line(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(tmp_path)
    shown = terminal.getvalue()
    assert re.search(r"\rtoy 9/9, .* pictures/s  0\.0 min left  .*loss \d", shown)
    assert shown.count("\n") == 1
    assert shown.endswith("\n")


def test_progress_is_logged_at_intervals(
    train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=4.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))

    with caplog.at_level(logging.INFO):
        train(tmp_path, machine=Machine())
    logged = [line for line in caplog.messages if line.startswith("toy ")]
    assert 2 <= len(logged) < 9
    assert logged[-1].startswith("toy 9/9 ")


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
@pytest.mark.parametrize(
    ("max_minutes", "minutes_after", "said"),
    [
        (3, 12, r" min left, at most 1[45]\.\d in all(, until about step \d+)?  learning rate \S+  loss "),
        (0, 600, r" min left, about 6\d\d\.\d in all  learning rate "),
    ],
    ids=["with a time limit", "without one"],
)
def test_the_log_says_how_long_all_stages_take(
    train: Callable,
    max_minutes: float,
    minutes_after: float,
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress.Progress.__init__, "__defaults__", (0.0, 0.0))  # seconds between lines
    with caplog.at_level(logging.INFO):
        train(tmp_path, machine=Machine(max_minutes=max_minutes, minutes_after=minutes_after))
    first = next(line for line in caplog.messages if line.startswith("toy "))
    assert re.search(said, first)


def test_minutes_after_a_stage_are_those_left_or_expected(tmp_path: Path) -> None:
    limited, endless = Minutes(tmp_path, 60.0), Minutes(tmp_path, 0.0)
    endless.expected = 45.0
    assert limited.after(12.0, is_last=False) == pytest.approx(48, abs=0.1)
    assert endless.after(0.0, is_last=False) == 45
    assert limited.after(12.0, is_last=True) == endless.after(0.0, is_last=True) == 0
    assert limited.for_stage(False, []) == pytest.approx(12)
    assert limited.for_stage(True, [20.0]) == pytest.approx(40, abs=0.1)
    assert endless.for_stage(True, [20.0]) == 0


def test_the_forecast_is_one_plain_line_with_or_without_a_time_limit(
    train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    assert progress.stage_title("gpt", ("vqgan", "gpt")) == "stage 2 of 2: the transformer"
    title = progress.stage_title("vqgan", ("vqgan", "gpt"))
    endless = progress.Forecast("vqgan", title, 0.0, 0.0, fine_tunes=False)
    with caplog.at_level(logging.INFO):
        train(tmp_path, callbacks=[endless], machine=Machine())
    (line,) = [line for line in caplog.messages if line.startswith("stage ")]
    assert re.fullmatch(r"stage 1 of 2: the VQGAN, ends after 9 steps, in about [\d.e-]+ minutes", line)
    assert endless.steps is None


def test_the_report_is_written_during_a_stage_and_when_it_is_interrupted(train: Callable, tmp_path: Path) -> None:
    written = []

    forecast = progress.Forecast("vqgan", "stage 1 of 1: the VQGAN", 0.0, 0.0, fine_tunes=False)
    live = LiveReport(forecast, lambda *given: written.append(given), seconds=0.0)
    with pytest.raises(Cut):
        train(tmp_path, callbacks=[live], cut=5)
    sentences = [sentence for _, _, sentence in written]
    assert sentences[0] == "Running: stage 1 of 1: the VQGAN, from step 0 on."
    assert re.fullmatch(r"Running: stage 1 of 1: the VQGAN, step 3 of 9, \d+ pictures/s  .* min left\.", sentences[3])
    assert sentences[-1].startswith("Interrupted in stage 1 of 1: the VQGAN, at step 5. The same command")
    values = written[3][0]
    assert (values["steps"], values["planned_steps"], values["minutes"]) == (3, 9, 0)
    assert values["loss"] > 0


class Full(Callback):
    """A machine that is out of memory at step 3."""

    def on_train_batch_start(self, trainer: object, *_: object) -> None:
        if trainer.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("processes", [1, 2])
def test_out_of_memory_names_a_smaller_batch_and_keeps_the_checkpoint(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    where = " in one of 2 processes" if processes == 2 else ""
    sentence = f"toy: out of memory{where} with batch_size 8 .*; train with a smaller batch_size, such as 4, into"
    with monkeypatch.context() as patched:
        patched.setattr(fit_module, "process_count", lambda: processes)
        with pytest.raises(ValueError, match=sentence):
            train(tmp_path, callbacks=[Full()])
    assert find_checkpoint(tmp_path).steps == 3
    assert train(tmp_path).record["steps"] == 9
    history = read_history(tmp_path / "history.jsonl")
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 10))


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_out_of_memory_for_a_batch_of_one_names_other_settings(train: Callable, tmp_path: Path) -> None:
    class NoRoom(Callback):
        def on_fit_start(self, *_: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with pytest.raises(ValueError, match=r"with batch_size 1 .*; train with a smaller size or resolution, into"):
        train(tmp_path, replace(CONFIG, batch_size=1), callbacks=[NoRoom()])


class Learns(Callback):
    """Checks that the network is in training mode at every step."""

    def on_train_batch_start(self, trainer: object, module: Stage, batch: object, index: int) -> None:
        assert module.training
        assert all(part.training for part in (getattr(module, "vqgan", None) or module.gpt).modules())


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_a_grid_that_runs_out_of_memory_is_skipped(train: Callable, tmp_path: Path) -> None:
    class NoRoom(Grids):
        tried = 0

        def rows(self, module: Stage) -> list[list[Image.Image]]:
            self.tried += 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    no_room = NoRoom(tmp_path)
    assert train(tmp_path, callbacks=[no_room, Learns()]).record["steps"] == 9
    assert no_room.tried > 2


@pytest.mark.parametrize(("there", "nodes", "shared_by"), [(0, 1, "auto"), (3, 1, "2"), (8, 1, "8"), (8, 4, "4")])
def test_as_many_gpus_are_used_as_divide_the_batches(
    monkeypatch: pytest.MonkeyPatch, there: int, nodes: int, shared_by: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert Machine(nodes=nodes).with_gpus_for(16, 32).devices == shared_by
    assert Machine("5").with_gpus_for(16, 32).devices == "5"


@contextmanager
def disk_with(most: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the system refuses to write more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_a_full_disk_is_an_error_that_keeps_the_last_checkpoint(train: Callable, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(tmp_path, cut=4)
    before = find_checkpoint(tmp_path).path.read_bytes()
    for room in (10_000, len(before) // 2, len(before) - 1):  # enough for the history
        with disk_with(room), pytest.raises(OSError, match=r"File too large.*last\.ckpt"):
            train(tmp_path)
        assert find_checkpoint(tmp_path).path.read_bytes() == before
        assert not list(tmp_path.glob(f"{PARTIAL}*"))
    assert train(tmp_path).record["steps"] == 9


def test_a_full_disk_is_an_error_for_weights_and_arrays_too(tmp_path: Path) -> None:
    with disk_with(1000), pytest.raises(OSError, match=r"gpt\.safetensors: could not be written \(.*; make room"):
        save_part(tiny_networks().gpt, tmp_path / "gpt.safetensors")
    assert not list(tmp_path.iterdir())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("only root can make a disk that is full")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            save_array(tmp_path / "rows.npy", np.ones((2, 2**20), np.uint8))
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    else:  # one bit in the middle of a tensor
        place = len(whole) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])


@pytest.mark.parametrize("how", ["cut off", "one bit", "missing"])
@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_a_stage_resumes_from_the_checkpoint_before_a_damaged_one(
    train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    whole = train(tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.raises(Cut):
        train(cut, cut=7)
    last, previous = find_checkpoint(cut).steps, read_checkpoint(cut / "previous.ckpt")["global_step"]
    assert previous < last
    if how == "missing":  # killed while it was written
        (cut / "last.ckpt").unlink()
    else:
        damaged(cut / "last.ckpt", how)
    with pytest.raises(Cut):
        train(cut, cut=previous + 1)  # which keeps the checkpoint it resumed from
    if how != "missing":
        warning = (
            f"last.ckpt is damaged (.*): resuming from the checkpoint before it, of step {previous}; later steps are"
        )
        assert any(re.search(warning, message) for message in caplog.messages)
    assert find_checkpoint(cut).path == cut / "last.ckpt"
    resumed = train(cut)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert read_history(tmp_path / "whole" / "history.jsonl") == read_history(cut / "history.jsonl")


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_a_stage_with_damaged_checkpoints_only_is_refused(train: Callable, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(tmp_path, cut=4)
    for name in ("last.ckpt", "previous.ckpt"):
        damaged(tmp_path / name, "one bit")
    sentence = (
        rf"last.ckpt is damaged .* and .*previous.ckpt is damaged .* no other checkpoint: delete {tmp_path} to train"
    )
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path)


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_the_last_weights_replace_damaged_best_ones(
    train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, replace(CONFIG, patience=9))
    damaged(tmp_path / "best.ckpt", "one bit")
    stage = train(tmp_path, replace(CONFIG, patience=9))
    assert "best_step" not in stage.record
    last = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert all(torch.equal(value, last[name]) for name, value in stage.state_dict().items())
    assert any("best.ckpt is damaged" in message for message in caplog.messages)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("train", ["gpt"], indirect=True)
@pytest.mark.usefixtures("interruptible")
def test_a_signal_saves_a_checkpoint_and_then_ends_the_stage(
    train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    class Signal(Callback):
        def on_train_batch_start(self, trainer: object, *_: object) -> None:
            if trainer.global_step == 2:
                os.kill(os.getpid(), number)

    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as end:
        train(tmp_path, machine=Machine(), callbacks=[Signal()])
    assert end.value.code == 128 + number
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert find_checkpoint(tmp_path).steps == 3
    assert f"toy: ended by {number.name}; the checkpoint of step 3 is saved" in caplog.messages
    with caplog.at_level(logging.INFO):
        assert train(tmp_path, machine=Machine()).record["steps"] == 9
    assert "toy: resumed from step 3 of 9, after 0.0 minutes" in caplog.messages


class Rates(Callback):
    """Records the learning rate and time_spent of every step; interrupts the stage after this share of its time."""

    def __init__(self, until: float = 2.0):
        self.until, self.seen = until, []

    def on_train_batch_end(self, trainer: object, stage: Stage, *_: object) -> None:
        self.seen.append((trainer.optimizers[0].param_groups[-1]["lr"], stage.time_spent))
        if stage.time_spent > self.until:
            raise Cut


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_a_resumed_stage_has_the_rest_of_its_minutes_and_a_lower_rate(train: Callable, tmp_path: Path) -> None:
    endless, limited = replace(CONFIG, steps=100_000), Machine(max_minutes=2 / 60, save_seconds=0)
    first, second = Rates(until=0.7), Rates()
    with pytest.raises(Cut):
        train(tmp_path, endless, machine=limited, callbacks=[first])
    stage = train(tmp_path, endless, machine=limited, callbacks=[second])
    assert stage.record["ended_by"] == "time"
    assert second.seen[0][1] > 0.6
    rates = [rate for rate, spent in [*first.seen, *second.seen] if spent > 0.1]
    assert max(rate for rate, _ in second.seen) < 0.5 * rates[0]
    assert sorted(rate for rate, _ in second.seen)[::-1] == [rate for rate, _ in second.seen]


@pytest.mark.parametrize("train", ["gpt"], indirect=True)
def test_a_stage_ended_by_its_time_limit_continues_only_with_more_time(train: Callable, tmp_path: Path) -> None:
    endless = replace(CONFIG, steps=499, patience=10**6)  # all of them are in the history
    limited = Machine(max_minutes=0.3 / 60)
    ended = train(tmp_path, endless, machine=limited)
    again = train(tmp_path, endless, machine=limited)
    assert {**again.record, "starts": 0} == {**ended.record, "starts": 0}
    assert again.record["starts"] == ended.record["starts"]
    longer = train(tmp_path, endless, machine=Machine(max_minutes=0.9 / 60))
    assert longer.record["steps"] > ended.record["steps"]
    steps = [entry["step"] for entry in read_history(tmp_path / "history.jsonl") if "loss" in entry]
    assert len(steps) == len(set(steps))


class Few(torch.utils.data.Dataset):
    """Four pictures again and again: the network overfits, so the validation loss rises."""

    def __init__(self, encoded: EncodedPictures):
        self.encoded = encoded

    def __getitem__(self, number: int) -> object:
        return self.encoded.draw(number % 4, np.random.default_rng(number))


OVERFITTING = replace(CONFIG, steps=2000, learning_rate=3e-3, validate_every=10, patience=3)


def test_early_stopping_keeps_the_best_weights(encoded: EncodedPictures, tmp_path: Path) -> None:
    stage = stage_2(OVERFITTING)
    held_back = torch.utils.data.Subset(encoded, range(8, 24))
    record = fit("toy", stage, Few(encoded), held_back, tmp_path, seed=0)
    losses = {e["step"]: e["val_loss"] for e in read_history(tmp_path / "history.jsonl") if "val_loss" in e}
    assert record["best_step"] == min(losses, key=losses.get)
    assert record["steps"] == record["best_step"] + 30
    assert record["val_loss"] == pytest.approx(min(losses.values()), abs=1e-4)
    stage.gpt.eval()
    batch = [torch.utils.data.default_collate([held_back[i] for i in range(16)])]
    with torch.no_grad():
        logits = stage.gpt(batch[0][3], batch[0][1][:, :-1])
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][1].flatten())
    assert float(found) == pytest.approx(record["val_loss"], abs=1e-3)


@pytest.mark.parametrize("when", ["on_validation_start", "on_validation_end"])
def test_the_result_of_a_validation_survives_an_interruption_after_it(
    encoded: EncodedPictures, tmp_path: Path, when: str
) -> None:
    held_back = torch.utils.data.Subset(encoded, range(8, 24))

    def trained(folder: Path, callbacks: list[Callback], **options: object) -> dict[str, object]:
        stage = stage_2(OVERFITTING)
        return fit("toy", stage, Few(encoded), held_back, folder, seed=0, callbacks=callbacks, **options)

    whole = trained(tmp_path / "whole", [])

    def cut(trainer: object, *_: object) -> None:
        if trainer.global_step == whole["best_step"]:
            raise Cut

    callback = Callback()
    setattr(callback, when, cut)
    with pytest.raises(Cut):
        trained(tmp_path / "cut", [callback], machine=SAVING)
    again = trained(tmp_path / "cut", [])
    assert {name: again[name] for name in ("steps", "best_step", "val_loss")} == {
        name: whole[name] for name in ("steps", "best_step", "val_loss")
    }
    assert read_history(tmp_path / "cut" / "history.jsonl") == read_history(tmp_path / "whole" / "history.jsonl")


def test_a_value_of_the_history_is_rounded_as_one_of_the_last_step(tmp_path: Path) -> None:
    logged, history = {"loss": torch.tensor(3.4312752)}, History(tmp_path / "history.jsonl")
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.2345678e-5}])
    trainer = SimpleNamespace(
        callback_metrics=logged, global_step=1, is_global_zero=True, optimizers=[optimizer], loggers=[]
    )
    last = history.last_values(trainer)
    history._write(trainer, validation=False)
    assert read_history(history.path) == [{"step": 1, "loss": 3.431275, "learning_rate": 1.235e-5}]
    trainer.callback_metrics = {}
    assert history.last_values(trainer) == last


def test_a_truncated_line_of_the_history_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_history(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["vqgan"], indirect=True)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with a C++ compiler")
def test_a_compiled_stage_has_the_losses_of_an_uncompiled_one(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Muon's rounding to bfloat16 would enlarge differences in the last bits.
    monkeypatch.setattr(stage_module, "prefers_bfloat16", lambda device, training: False)
    plain, compiled = (
        train(tmp_path / str(compile), replace(CONFIG, steps=5, precision="32-true", compile=compile))
        for compile in (False, True)
    )
    losses = [
        [entry["loss"] for entry in read_history(tmp_path / str(one) / "history.jsonl") if "loss" in entry]
        for one in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert plain.record["steps"] == compiled.record["steps"] == 5
