"""Cog's real HTTP server as a child process, and requests to it."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


class Server:
    """A server process, and requests to it."""

    def __init__(self, command: list[str], folder: Path, log: Path, **environment: str):
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "PORT": str(self.port), "OMP_NUM_THREADS": "1", **environment}
        with log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)

    def request(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
        """Status and body of one request."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def health(self) -> dict:
        return self.request("GET", "/health-check")[1]

    def wait_until_set_up(self) -> Server:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.health()["status"] != "STARTING":
                    return self
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def predict(self, **inputs: object) -> dict:
        """The reply to a prediction. Retries 409 for a while, as every client of Cog has to."""
        for _ in range(1500):
            status, reply = self.request("POST", "/predictions", {"input": inputs})
            if status != 409:
                assert status == 200, reply
                return reply
            time.sleep(0.02)
        raise AssertionError("the server stayed at capacity")

    def pictures(self, **inputs: object) -> list[Image.Image]:
        reply = self.predict(**inputs)
        assert reply["status"] == "succeeded", reply
        return [decoded(url) for url in reply["output"]]

    def refused(self, **inputs: object) -> list[dict]:
        status, reply = self.request("POST", "/predictions", {"input": inputs})
        assert status == 422, reply
        return reply["detail"]

    def failed(self, **inputs: object) -> str:
        """What a failing prediction says; the server must be ready for the next."""
        reply = self.predict(**inputs)
        assert reply["status"] == "failed", reply
        # The reply is sent a moment before the slot is free again.
        wait_for(lambda: self.health()["status"] == "READY")
        return reply["error"]


def nameless_user() -> list[str]:
    """A prefix of commands that runs them as a user without a name, as `docker run --user 54321` does. Such a user may
    read all files here, but write to none. Only root can do that, with setpriv; else it is today's user.
    """
    names = ("USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    unset = ["env", *(f"--unset={name}" for name in names)]
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    try:
        possible = subprocess.run([*user, "true"], capture_output=True).returncode == 0
    except OSError:
        possible = False
    return [*unset, *user] if possible else unset


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Returns when the condition holds. slow_inputs take longer than the limit, everything else a fraction of it."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)


def decoded(url: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    picture.load()
    return picture


@contextmanager
def running(command: list[str], folder: Path, scratch: Path, **environment: str) -> Iterator[Server]:
    own = {"TMPDIR": str(scratch), "CLIP_GEN_CACHE": str(scratch / "cache")}
    server = Server(command, folder, scratch / "log", **own, **environment)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
