"""download.py against servers that answer slowly or never."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_files import web_server

from clip_gen import download
from clip_gen.download import open_url

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.fixture
def trickle(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that sends the parameter's text at once and then a byte every 50 ms for ever; its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def serve() -> None:
        client, _ = listening.accept()
        with client:
            client.sendall(request.param)
            while not closing.wait(0.05):
                try:
                    client.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    closing.set()
    thread.join()
    listening.close()


@pytest.mark.parametrize("trickle", [b"HTTP/1.1 200 OK\r\nX: ", HEAD], indirect=True, ids=["head", "body"])
def test_a_server_that_trickles_for_ever_is_left_at_the_deadline(trickle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "DEADLINE_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0\.5 seconds"), open_url(trickle) as reply:
        reply.read(10_000)
    assert time.monotonic() - started < 5


@pytest.fixture
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_silent_server_is_left_soon_after_should_stop_says_so(silent: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionAbortedError, match="stopped"):
        open_url(silent, should_stop=lambda: time.monotonic() - started > 0.2)
    assert time.monotonic() - started < 5


def test_a_silent_server_is_left_after_the_timeout(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.5 seconds"):
        open_url(silent)


def test_what_comes_is_what_was_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(sent := bytes(range(256)) * 4000)
    with web_server(tmp_path) as address, open_url(f"{address}/file") as reply:
        assert reply.read() == sent


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with web_server(tmp_path) as address, pytest.raises(OSError, match="404"):
        open_url(f"{address}/absent")
