"""The proxy of deploy/, started with Debian's nginx, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cog_server import wait_for

from clip_gen.files import ROOT

MODULE = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")
NGINX = pytest.mark.skipif(
    not (shutil.which("nginx") and MODULE.exists()),
    reason="needs nginx with njs: apt-get install nginx libnginx-mod-http-js",
)
TOKEN = "a-token-for-tests"


class Door:
    """A running proxy."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
        """Status and JSON of the reply to one request with the token. body: text or bytes are sent as they are."""
        data = body if body is None or isinstance(body, str | bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"} | headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, data, headers)
            reply = connection.getresponse()
            text = reply.read()
            return reply.status, json.loads(text) if text.startswith(b"{") else {"text": text.decode()}
        finally:
            connection.close()

    def refused(self, method: str, path: str, body: object = None, **headers: str) -> str:
        """The sentence with which the proxy refuses it."""
        status, reply = self.ask(method, path, body, **headers)
        assert status == 400, reply
        return reply["detail"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def open_door(
    folder: Path, predictions: int, trainings: int = 9, changes: dict[str, str] | None = None, **settings: str
) -> Iterator[Door]:
    """deploy/nginx.conf with other ports, other folders and `changes`. predictions, trainings: ports of the servers."""
    folder.mkdir()
    changes = {
        **{"/etc/clip-gen-door": str(folder), "/tmp/": f"{folder}/"},
        **{"127.0.0.1:5000": f"127.0.0.1:{predictions}", "127.0.0.1:5001": f"127.0.0.1:{trainings}"},
        **(changes or {}),
    }
    for _ in range(3):  # another test may take the free port first
        port = free_port()
        process = _started(folder, changes | {"listen 8080": f"listen 127.0.0.1:{port}"}, settings)
        wait_for(lambda: process.poll() is not None or _listens(port), seconds=60)  # noqa: B023
        if process.poll() is None:
            break
    try:
        assert process.poll() is None, (folder / "log").read_text()
        yield Door(port)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _started(folder: Path, changes: dict[str, str], settings: dict[str, str]) -> subprocess.Popen:
    for name in ("nginx.conf", "door.js"):
        text = (ROOT / "deploy" / name).read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        (folder / name).write_text(text)
    environment = {**os.environ, "DOOR_TOKEN": TOKEN, **settings}
    with (folder / "log").open("w") as log:
        command = ["nginx", "-e", "stderr", "-c", str(folder / "nginx.conf"), "-p", str(folder)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
