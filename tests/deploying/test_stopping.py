"""A server as in a container, started, probed, stopped and killed as deploy/kubernetes.yaml says."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cog_server import Server, wait_for
from containers import CONTAINER, contained, inside
from image_files import copy_image_files
from model_files import slow_folder, web_server
from webhooks import Receiver, receiver

from clip_gen.files import ROOT

pytestmark = [CONTAINER, pytest.mark.slow]  # each waits for a server with a slow model to start
MANIFEST = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))
[MODEL] = MANIFEST[0]["spec"]["template"]["spec"]["containers"]
LONG = {"prompt": "a star", "candidates": 32, "num_outputs": 1}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of an image that removes the folders of a prediction after two seconds instead of a minute."""
    folder = copy_image_files(tmp_path_factory.mktemp("image") / "src")
    slots = folder / "clip_gen" / "serving" / "slots.py"
    slots.write_text(slots.read_text().replace("FOLDER_SECONDS = 60", "FOLDER_SECONDS = 2"))
    return folder


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(slow_folder(tmp_path_factory.mktemp("models") / "slow"))


@pytest.fixture
def hooks() -> Iterator[Receiver]:
    with receiver() as started:
        yield started


def probe(server: Server, name: str) -> bool:
    """Whether a probe of the manifest succeeds."""
    command = [word.replace(":5000/", f":{server.port}/") for word in MODEL[name]["exec"]["command"]]
    return subprocess.run(inside(server, *command), capture_output=True).returncode == 0


def start(server: Server, hooks: Receiver, name: str, **inputs: int) -> None:
    """An asynchronous prediction that takes many seconds."""
    asked = {"input": LONG | inputs, "webhook": hooks.address}
    status, reply = server.request("PUT", f"/predictions/{name}", asked, Prefer="respond-async")
    assert status == 202, reply
    wait_for(lambda: bool(hooks.messages), seconds=60)


def wait_for_a_reply(server: Server) -> tuple[threading.Thread, list]:
    """A prediction whose client waits, and what that client gets."""
    replies: list = []
    client = threading.Thread(target=lambda: replies.append(server.request("POST", "/predictions", {"input": LONG})))
    client.start()
    time.sleep(1)
    return client, replies


def test_a_killed_worker_fails_all_predictions_and_ends_the_server(
    image: Path, slow: str, hooks: Receiver, tmp_path: Path
) -> None:
    with contained(image, tmp_path, COG_WEIGHTS=slow, LOG_FORMAT="console") as server:
        assert probe(server, "livenessProbe")
        assert probe(server, "readinessProbe")
        start(server, hooks, "asynchronous")
        client, replies = wait_for_a_reply(server)
        [worker] = subprocess.run(
            ["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(worker), signal.SIGKILL)
        wait_for(lambda: not probe(server, "livenessProbe"))
        client.join(timeout=20)
        assert [(status, reply["status"], reply["error"]) for status, reply in replies] == [
            (200, "failed", "Worker crashed")
        ]
        assert server.process.wait(timeout=20) == -signal.SIGKILL
        text = server.log.read_text()
        assert "Server ready" in text
        assert not [line for line in text.splitlines() if line.startswith("{")]
        assert {"failed": "Worker crashed"}.items() <= {m["status"]: m.get("error") for m in hooks.messages}.items()


def test_prestop_waits_for_asynchronous_predictions_which_sigterm_drops(
    image: Path, slow: str, hooks: Receiver, tmp_path: Path
) -> None:
    with contained(image, tmp_path, COG_WEIGHTS=slow) as server:
        hook = inside(server, *MODEL["lifecycle"]["preStop"]["exec"]["command"])
        subprocess.run(hook, check=True, timeout=20)  # an idle server is stopped at once
        start(server, hooks, "waited-for")
        subprocess.run(hook, check=True, timeout=200)
        wait_for(lambda: "succeeded" in {message["status"] for message in hooks.messages})
        hooks.messages.clear()
        start(server, hooks, "dropped", candidates=256)
        client, replies = wait_for_a_reply(server)
        server.process.terminate()
        assert server.process.wait(timeout=100) == 0
        client.join(timeout=20)
        assert [(status, reply["status"]) for status, reply in replies] == [(200, "succeeded")]
        assert {message["status"] for message in hooks.messages} <= {"starting", "processing"}


def test_one_training_at_a_time_delivers_from_a_read_only_folder(
    image: Path, photos: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """As in an image, with twelve slots."""
    quick = {"vqgan_steps": 2, "transformer_steps": 40, "batch_size": 4, "adversarial_weight": 0, "crop": False}
    with (
        web_server(photos.parent) as website,
        contained(image, tmp_path, "--x-mode", "train", CLIP_GEN_ALLOW_WEIGHTS="any") as server,
    ):
        asked = {"images": f"{website}/{photos.name}", "base": str(tiny_model_folder), **quick}
        replies: list = []
        first = threading.Thread(target=lambda: replies.append(server.request("POST", "/trainings", {"input": asked})))
        first.start()
        wait_for(lambda: "usable pictures" in server.log.read_text(), seconds=200)
        status, reply = server.request("POST", "/trainings", {"input": asked})
        assert (status, reply["status"]) == (200, "failed")
        assert "this server trains one model at a time" in reply["error"]
        first.join(timeout=250)
        [(status, reply)] = replies
        assert (status, reply["status"]) == (200, "succeeded"), reply
        assert reply["output"]["weights"].startswith("data:application/x-tar;base64,")
        assert f"{image} cannot be written to: the weights go to {tmp_path}/" in server.log.read_text()
    assert not (image / "trained_model.tar").exists()
