"""watchdog.py with Cog's real server: a server without its worker ends; other ends do not change."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cog_server import Server, nameless_user, running, wait_for
from model_files import slow_folder

from clip_gen.files import ROOT
from clip_gen.serving.watchdog import GRACE

SERVE = str(ROOT / "script" / "serve")


def worker_of(server: Server) -> int:
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True)
    return int(found.stdout)


def watchdogs(server: Server) -> list[str]:
    """The command lines of the watchdogs of this server that are alive."""
    found = subprocess.run(["pgrep", "-af", rf"watchdog.py {server.process.pid}\b"], capture_output=True, text=True)
    return found.stdout.splitlines()


def liveness_probe() -> str:
    """The command in docs/serving.md."""
    return re.search(r"^curl .*$", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE).group()


def lives(server: Server) -> bool:
    probe = liveness_probe().replace("5000", str(server.port))
    return subprocess.run(["bash", "-o", "pipefail", "-c", probe], capture_output=True).returncode == 0


@contextmanager
def small_server(model: Path, scratch: Path, *command: str, **environment: str) -> Iterator[Server]:
    with running([*command, SERVE], scratch, scratch, COG_WEIGHTS=str(model), **environment) as server:
        yield server.wait_until_set_up()


def test_a_prediction_ends_at_the_limit_and_a_killed_worker_ends_the_server(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    slow = str(slow_folder(tmp_path / "slow"))
    limits = {"CLIP_GEN_MAX_SECONDS": "6", "CLIP_GEN_ALLOW_WEIGHTS": "any"}
    with small_server(tiny_model_folder, tmp_path, **limits) as server:
        inputs = {"prompt": "a star", "candidates": 256, "guidance": 2, "replicate_weights": slow}
        assert "the prediction took longer than 6 seconds; ask for fewer candidates" in server.failed(**inputs)
        assert len(server.pictures(prompt="a star", candidates=2, num_outputs=2)) == 2
        assert lives(server)
        assert list(tmp_path.glob("clip-gen-*"))
        os.kill(worker_of(server), signal.SIGKILL)
        wait_for(lambda: not lives(server))
        assert server.process.wait(timeout=GRACE + 10) == -signal.SIGKILL
        assert "the worker process was killed or has crashed; ending the server" in server.log.read_text()
        wait_for(lambda: not watchdogs(server))
        assert not list(tmp_path.glob("clip-gen-*"))


def test_a_worker_killed_while_loading_ends_the_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        weights = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.tar"
        with running([SERVE], tmp_path, tmp_path, COG_WEIGHTS=weights) as server:
            wait_for(lambda: watchdogs(server), seconds=60)
            os.kill(worker_of(server), signal.SIGKILL)
            assert server.process.wait(timeout=GRACE + 10) == -signal.SIGKILL
            wait_for(lambda: not watchdogs(server))
            assert not list(tmp_path.glob("clip-gen-*"))


def test_a_server_of_a_nameless_user_starts_and_leaves_no_files(tiny_model_folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with small_server(tiny_model_folder, tmp_path, "setsid", *nameless_user(), HOME="") as server:
        assert server.health()["status"] == "READY"
        (pictures,) = tmp_path.glob("clip-gen-*")
        assert pictures.stat().st_uid == (54321 if "setpriv" in nameless_user() else os.getuid())
        assert len(watchdogs(server)) == 1
        os.killpg(server.process.pid, signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
        wait_for(lambda: not watchdogs(server))
        assert not pictures.exists()


def test_a_training_server_ends_with_its_worker_after_the_first_training(tmp_path: Path) -> None:
    with running([SERVE, "--x-mode", "train"], tmp_path, tmp_path) as server:
        server.wait_until_set_up()
        assert not watchdogs(server)
        for _ in range(2):
            status, reply = server.request("POST", "/trainings", {"input": {"images": "/etc/hostname"}})
            assert (status, reply["status"]) == (200, "failed"), reply
            wait_for(lambda: server.health()["status"] == "READY")
        assert len(watchdogs(server)) == 1
        os.kill(worker_of(server), signal.SIGKILL)
        assert server.process.wait(timeout=GRACE + 10) == -signal.SIGKILL
