"""train_process.py and train.py: results of trainings over HTTP, with and without a writable project folder."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cog_server import Server, running, wait_for
from processes import data_url, trainings

from clip_gen.files import ROOT, folder_lock
from clip_gen.serving import train_process
from clip_gen.serving.inputs import InputError, checked
from clip_gen.serving.serve import write_schema
from clip_gen.serving.train_process import MAX_LINE, failure, keep, one_training, sent_name

STEPS = {"stage": "vqgan", "vqgan_steps": 2, "batch_size": 4}
IMAGE = {  # what Cog's command line bakes into an image
    "COG_TRAIN_TYPE_STUB": "train.py:train",
    "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
    "COG_MAX_CONCURRENCY": "12",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
READ_ONLY = f"""
mount --bind {ROOT} {ROOT} && mount -o remount,bind,ro {ROOT} && cd {ROOT}
exec python -m cog.server.http --host 127.0.0.1 --x-mode train
"""
MAY_MOUNT = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps the messages of webhooks."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.messages: list[tuple[int, dict]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.messages.append((len(body), json.loads(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A training server as in an image, with 12 slots, in a read-only project folder."""
    if not MAY_MOUNT:
        pytest.skip("only a user who may mount can make the project read-only")
    scratch = tmp_path_factory.mktemp("server")
    write_schema()
    with running(
        ["unshare", "-m", "bash", "-c", READ_ONLY], ROOT, scratch, CLIP_GEN_ALLOW_WEIGHTS="any", **IMAGE
    ) as started:
        yield started.wait_until_set_up()


def ready(server: Server) -> None:
    wait_for(lambda: server.health()["status"] == "READY")


def test_a_training_in_a_read_only_project_keeps_its_weights_in_a_temporary_folder(
    server: Server, receiver: Receiver, photos: Path, tiny_model_folder: Path
) -> None:
    given = {"images": data_url(photos), "base": str(tiny_model_folder), **STEPS, "seed": 7}
    body = {"input": given, "webhook": receiver.address}
    assert server.request("PUT", "/trainings/one", body, Prefer="respond-async")[0] == 202
    wait_for(lambda: receiver.messages and "24 usable pictures" in receiver.messages[-1][1]["logs"], seconds=60)
    # A second training has a slot but is refused. Repeating the PUT of the first returns its state.
    second = server.request("POST", "/trainings", {"input": given | {"seed": 8}})[1]
    assert second["status"] == "failed"
    assert "trains one model at a time, and a training is under way; try again when it has ended" in second["error"]
    status, state = server.request("PUT", "/trainings/one", {"input": {}})
    assert (status, state["status"]) == (202, "processing")
    assert "24 usable pictures" in state["logs"]
    wait_for(lambda: receiver.messages[-1][1]["status"] != "processing", seconds=180)
    reply = receiver.messages[-1][1]
    assert reply["status"] == "succeeded", reply
    scratch = server.log.parent
    lines = reply["logs"].splitlines()
    assert lines[0].startswith(f"{ROOT} cannot be written to: the weights go to {scratch}/clip-gen-train-")
    kept = Path(lines[-1].partition("kept: ")[2].partition(" and ")[0])
    assert kept.is_relative_to(scratch)
    sent = base64.b64decode(reply["output"]["weights"].partition(",")[2])
    assert sent == kept.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(sent)) as tar:
        assert json.load(tar.extractfile("training.json"))["settings"]["seed"] == 7
    assert any(line.startswith("images (the uploaded file): 24 usable pictures") for line in lines)
    paths = {word for word in "\n".join(lines[1:]).split() if word.startswith(str(scratch))}
    assert paths == {str(kept), str(kept.with_suffix(".html"))}  # and no temporary file of the request
    # The weights come twice, as docs/serving.md says.
    with_weights = [size for size, message in receiver.messages if message.get("output")]
    assert len(with_weights) == 2
    assert min(with_weights) > len(sent)
    ready(server)


def test_errors_name_the_file_as_the_client_sent_it(server: Server, receiver: Receiver) -> None:
    receiver.messages.clear()
    body = {"input": {"images": "data:text/plain;base64,bm8=", **STEPS}, "webhook": receiver.address}
    reply = server.request("POST", "/trainings", body)[1]
    assert reply["status"] == "failed"
    assert "images (the uploaded file): is a text file, not an archive" in reply["error"]
    assert str(server.log.parent) not in reply["error"]
    ready(server)
    wait_for(lambda: receiver.messages and receiver.messages[-1][1]["status"] == "failed")
    assert "train: images (the uploaded file)" in receiver.messages[-1][1]["logs"]
    status, reply = server.request("POST", "/predictions", {"input": {"prompt": "a star"}})
    assert status == 200  # where Cog strips nothing, as without its schema
    assert "this server trains models; for predictions, start another without --x-mode train" in reply["error"]
    assert "TypeError" not in reply["error"]
    ready(server)


def test_a_training_ends_with_its_server_and_leaves_no_files(
    server: Server, photos: Path, tiny_model_folder: Path
) -> None:
    given = {"images": data_url(photos), "base": str(tiny_model_folder), **STEPS, "vqgan_steps": 999}
    assert server.request("PUT", "/trainings/two", {"input": given}, Prefer="respond-async")[0] == 202
    scratch = server.log.parent
    wait_for(lambda: any(scratch.glob("clip-gen-train-*/*/out/*/settings.json")), seconds=60)
    assert trainings(server)
    server.process.kill()
    wait_for(lambda: not trainings(server), seconds=10)
    wait_for(lambda: not list(scratch.glob("clip-gen-train-*")) and not list(scratch.glob("tmp*")))


def test_without_a_writable_project_the_weights_go_to_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(train_process, "ROOT", Path("/proc"))
    with one_training(tmp_path) as (folder, kept):
        assert folder.is_dir()
        assert kept == tmp_path / "kept"
        assert kept.is_dir()
        (folder / "weights.tar").write_text("weights")
        (folder / "report.html").write_text("report")
        weights = keep(folder, kept, tmp_path)
    assert not folder.exists()
    assert f"/proc cannot be written to: the weights go to {kept}" in capsys.readouterr().out
    assert weights == kept / "trained_model.tar"
    assert weights.read_text() == "weights"
    assert (kept / "trained_model.html").read_text() == "report"


def test_weights_that_the_project_cannot_hold_go_to_a_temporary_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "weights.tar").write_text("weights")
    (tmp_path / "report.html").write_text("report")
    weights = keep(tmp_path, tmp_path / "gone", tmp_path)  # as a disk that has become full
    assert weights == tmp_path / "kept" / "trained_model.tar"
    assert weights.read_text() == "weights"
    assert "gone can no longer be written to (No such file or directory): the weights go to" in capsys.readouterr().out


def test_one_training_at_a_time_across_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_process, "ROOT", tmp_path)
    hold = (
        "import sys; from pathlib import Path; from clip_gen.serving import train_process\n"
        "train_process.ROOT = Path(sys.argv[1])\n"
        "with train_process.one_training(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match="one model at a time, and a training is under way; try"),
            one_training(tmp_path),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with one_training(tmp_path) as (_, kept):
        assert kept == tmp_path
        with (
            pytest.raises(ValueError, match=f"process {os.getpid()} holds it"),
            folder_lock(kept / ".cog/training", ""),
        ):
            pass


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("tmpa1b2c3d4photos.zip", "images (photos.zip)"),
        ("tmpa1b2c3d4file.zip", "images (the uploaded file)"),
        ("tmp_b2c3d4_file", "images (the uploaded file)"),
        ("tmpa1b2c3d4", "images (the uploaded file)"),
        ("photos.zip", "images (photos.zip)"),
    ],
)
def test_a_downloaded_file_is_named_after_its_url(name: str, shown: str) -> None:
    assert sent_name(Path("/tmp") / name) == shown


def test_a_line_of_a_training_may_be_longer_than_asyncio_allows_by_default() -> None:
    script = "print('x' * 2_000_000); print('last')"

    async def printed() -> list[bytes]:
        words = [sys.executable, "-c", script]
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE)
        lines = [line async for line in process.stdout]
        await process.wait()
        return lines

    assert asyncio.run(printed()) == [b"x" * 2_000_000 + b"\n", b"last\n"]


def test_an_error_contains_the_log_that_cog_leaves_out() -> None:
    text = failure(1, ["vqgan 1/2", "train: cancelled.zip: is cut off"])
    assert text.startswith("canceled.zip: is cut off\n\nThe last lines of the log:\nvqgan 1/2\n")
    assert sent_name(Path("tmp12345678\n\x1b[31mx.zip")) == "images (\ufffd\ufffd[31mx.zip)"
    killed = failure(-9, ["vqgan 1/2"])
    assert killed.startswith("the training ended by SIGKILL, perhaps for lack of memory\n")
    assert killed.endswith("vqgan 1/2")
    assert failure(1, ["Traceback", "KeyError"]).startswith("the training ended with exit status 1\n")
    with pytest.raises(InputError, match='unknown input "canceled"'):
        checked({}, cancelled=1)
