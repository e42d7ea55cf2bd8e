"""train_process.py and train.py: trainings of Cog's server and of script/train, at toy size."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cog_server import running, wait_for
from processes import command_lines, data_url, processes_of, trainings
from scripts import as_inputs, run_script

from clip_gen.files import ROOT
from clip_gen.serving.cli import command_words
from clip_gen.serving.inputs import checked
from clip_gen.serving.request_weights import REFUSALS
from clip_gen.serving.serve import write_schema
from clip_gen.serving.train_process import as_options, run_training
from clip_gen.training.folder import hash_of_model
from clip_gen.weights.tarball import pack
from train import INPUTS

TRAINING_SERVER = [str(ROOT / "script" / "serve"), "--x-mode", "train"]
SERVER = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
BAKED = {  # what Cog's command line bakes into an image
    "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
    "COG_TRAIN_TYPE_STUB": "train.py:train",
    "COG_MAX_CONCURRENCY": "8",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where it finds the worker's python
}
STEPS = {"vqgan_steps": 4, "transformer_steps": 4, "batch_size": 4}


def packed(model: Path, scratch: Path) -> str:
    """A model as a data URL."""
    pack(model, scratch / "base.tar")
    return data_url(scratch / "base.tar")


def test_every_input_is_an_option_of_the_command(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = checked(INPUTS, images=photos)
    words = as_options({name: value for name, value in values.items() if name != "images"})
    assert "--crop" in words
    assert as_options({"crop": False, "sample_prompts": "a star|b", "base": None}) == [
        *("--no-crop", "--sample-prompts=a star|b")
    ]
    assert "--base=auto" in words
    from clip_gen.__main__ import main as command

    with pytest.raises(SystemExit) as exit:
        command(["train", str(photos), "--out", "out", *words, "--help"])
    assert exit.value.code == 0
    help_text = capsys.readouterr().out
    for name in list(INPUTS)[1:]:
        assert f"--{name.replace('_', '-')}" in help_text, name


def test_the_error_is_the_last_line_of_the_training(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "few.zip").write_bytes(b"no archive")
    with pytest.raises(RuntimeError, match=r"few\.zip"):
        asyncio.run(run_training({"images": tmp_path / "few.zip"}, tmp_path / "out", {}))


def test_a_cancelled_training_ends_within_two_seconds(
    photos: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = []
    start = asyncio.create_subprocess_exec

    async def noted(*words: str, **options: object) -> asyncio.subprocess.Process:
        groups.append(await start(*words, **options))
        return groups[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)

    async def cancelled() -> float:
        values = {"images": photos, "base": str(tiny_model_folder), "vqgan_steps": 100_000, "batch_size": 4}
        task = asyncio.create_task(run_training(values, tmp_path / "out", {}))
        while not (tmp_path / "out" / "work" / "vqgan" / "history.jsonl").is_file():
            assert not task.done(), task
            await asyncio.sleep(0.1)
        assert len(processes_of(groups[0].pid)) >= 2  # the training and what loads its pictures
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - began

    assert asyncio.run(cancelled()) < 2
    wait_for(lambda: not processes_of(groups[0].pid), seconds=2)


def test_the_script_passes_a_dry_run_on(photos: Path) -> None:
    assert command_words("train", ["-i", f"images=@{photos}", "--dry-run"])[-1] == "--dry-run"
    url = "http://127.0.0.1:1/{0000..0001}.tar"
    assert command_words("train", ["-i", f"images={url}"])[1] == url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_the_script_trains_into_a_folder_and_takes_its_weights_as_base(
    photos: Path, tiny_model_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = as_inputs({"images": f"@{photos}", "base": tiny_model_folder, **STEPS})
    assert run_script("train", [*inputs, "-o", "out"]) == 0
    assert capsys.readouterr().out == "out/weights.tar\n"
    # Weights are named from the current folder.
    inputs = as_inputs({"images": f"@{photos}", "stage": "vqgan", "vqgan_steps": 1, "batch_size": 4})
    for more in (["-i", "base=out/weights.tar"], ["-e", "COG_WEIGHTS=out"]):
        assert run_script("train", [*inputs, *more, "-o", f"{more[0][1]}-further"]) == 0
        settings = json.loads((folder / f"{more[0][1]}-further" / "work" / "settings.json").read_text())
        assert settings["base"] == hash_of_model(folder / "out" / "model")


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"images": "@"}, 'images is ""; give a file'),
        ({"images": "@nothing.zip"}, "train: nothing.zip: no such file"),
        ({"images": "https://somewhere/photos.zip"}, "https://somewhere/photos.zip: is no tar; shards end in"),
        ({"images": "@PHOTOS", "stage": "all"}, 'stage is "all"; give one of both, vqgan, transformer'),
        ({"images": "@PHOTOS", "base": "checkpoints/shapes"}, "checkpoints/shapes: no such file or folder"),
    ],
)
def test_the_script_refuses_unusable_inputs(
    photos: Path,
    tiny_model_folder: Path,
    folder: Path,
    inputs: dict[str, str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = {"base": str(tiny_model_folder), **inputs, "images": inputs["images"].replace("PHOTOS", str(photos))}
    assert run_script("train", as_inputs(inputs)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_prints_how_to_resume(
    photos: Path, tiny_model_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    given = {"images": f"@{photos}", "base": tiny_model_folder, "vqgan_steps": 999, "batch_size": 4}
    words = [*as_inputs(given), "-o", str(out)]
    command = [sys.executable, "-m", "clip_gen.serving.cli", "train", *words]
    files = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    script = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, env=environment, **files)
    history = out / "work" / "vqgan" / "history.jsonl"
    wait_for(lambda: history.is_file() and history.read_text().count("\n") > 2, seconds=60)
    assert any(f"train {photos}" in words for words in command_lines().values())
    for _ in range(2):  # as `timeout` does it
        os.killpg(script.pid, number)
    said = script.communicate(timeout=20)[1]
    assert script.returncode == 128 + number, said
    assert (out / "work" / "vqgan" / "last.ckpt").is_file(), said
    assert f"vqgan: ended by {number.name}; the checkpoint of step " in said
    resume = f"{out} holds a checkpoint; this command resumes the training: {shlex.join(['script/train', *words])}\n"
    assert said.endswith(resume)
    assert "Traceback" not in said
    wait_for(lambda: not any(str(out) in words for words in command_lines().values()), seconds=2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("pymp-", "training-"))]


@pytest.fixture(scope="module")
def trained(photos: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The replies to trainings over HTTP, and the weights tar in the project's folder."""
    scratch = tmp_path_factory.mktemp("server")
    write_schema()
    with running(TRAINING_SERVER, scratch, scratch) as server:
        server.wait_until_set_up()
        given = {"images": data_url(photos), "base": packed(tiny_model_folder, scratch), **STEPS}
        status, reply = server.request("POST", "/trainings", {"input": given})
        assert status == 200, reply
        wait_for(lambda: server.health()["status"] == "READY")
        outside = []
        for strange in ({"images": "/etc/passwd"}, {"base": str(tiny_model_folder)}, {"base": "http://127.0.0.1:9/"}):
            outside.append(server.request("POST", "/trainings", {"input": given | strange})[1])
            wait_for(lambda: server.health()["status"] == "READY")
        bad = server.request("POST", "/trainings", {"input": {"images": "data:text/plain;base64,bm8=", **STEPS}})
        wait_for(lambda: server.health()["status"] == "READY")
        few = server.request("POST", "/trainings", {"input": {"stage": "all"}})
    return {"good": reply, "bad": bad, "few": few, "outside": outside}, ROOT / "trained_model.tar"


def test_the_server_trains_a_zip_to_weights(trained: tuple[dict, Path]) -> None:
    replies, tar = trained
    assert replies["good"]["status"] == "succeeded", replies["good"]
    assert "gpt 4/4" in replies["good"]["logs"]
    sent = base64.b64decode(replies["good"]["output"]["weights"].partition(",")[2])
    assert sent == tar.read_bytes()
    report = tar.with_suffix(".html")
    assert replies["good"]["logs"].splitlines()[-1] == f"kept: {tar} and {report}"
    assert "vqgan" in report.read_text()
    assert replies["bad"][1]["status"] == "failed"
    assert "archive" in replies["bad"][1]["error"]
    assert replies["few"][0] == 422


def test_a_request_cannot_name_files_or_addresses_of_the_server(trained: tuple[dict, Path]) -> None:
    images, *bases = trained[0]["outside"]
    assert 'images is "/etc/passwd"; give a file' in images["error"]
    for reply in bases:
        assert reply["status"] == "failed"
        assert reply["error"].endswith(REFUSALS["https"])
        assert "clip_gen train" not in reply["logs"]


def test_the_server_predicts_with_the_trained_weights(trained: tuple[dict, Path], tmp_path: Path) -> None:
    _, tar = trained
    with running(SERVER, ROOT, tmp_path, **BAKED, COG_WEIGHTS=str(tar)) as server:
        server.wait_until_set_up()
        reply = server.predict(prompt="a red circle", candidates=2, num_outputs=2, seed=1)
    assert reply["status"] == "succeeded", reply
    assert len(reply["output"]) == 2


def test_a_training_over_the_server_is_cancelled_within_two_seconds(
    photos: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    with running(TRAINING_SERVER, tmp_path, tmp_path) as server:
        server.wait_until_set_up()
        base = packed(tiny_model_folder, tmp_path)
        given = {"images": data_url(photos), "base": base, "vqgan_steps": 100_000, "batch_size": 4}
        status, _ = server.request("PUT", "/trainings/one", {"input": given}, Prefer="respond-async")
        assert status == 202
        wait_for(lambda: "vqgan 100/" in server.log.read_text() or bool(trainings(server)), seconds=60)
        assert server.request("POST", "/trainings", {"input": given})[0] == 409  # one at a time
        server.request("POST", "/trainings/one/cancel")
        wait_for(lambda: not trainings(server), seconds=2)
        wait_for(lambda: server.health()["status"] == "READY")
