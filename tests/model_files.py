"""Model folders, tars and a web server for the tests of what lies between Cog and the model."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from conftest import TINY, tiny_networks

from clip_gen.weights.model_folder import build, save_networks


def other_folder(folder: Path) -> Path:
    """A toy model that draws other pictures than the usual one."""
    save_networks(tiny_networks(seed=1), folder, training={"seed": 1})
    return folder


def slow_folder(folder: Path) -> Path:
    """A toy model with pictures of 1024 tokens: 256 candidates take it many seconds, one token no time."""
    config = replace(
        TINY, name="slow", vqgan=replace(TINY.vqgan, resolution=128), gpt=replace(TINY.gpt, block_size=1024)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = build(config)
        networks.vqgan.train()
        networks.vqgan(torch.rand(2, 3, 128, 128) * 2 - 1)  # the codebook starts from its first batch
    for network in (networks.clip, networks.vqgan, networks.gpt, networks.bridge):
        network.eval().requires_grad_(False)
    save_networks(networks, folder, training={})
    return folder


@contextmanager
def web_server(folder: Path, hidden: Sequence[str] = ()) -> Iterator[str]:
    """A web server of our own on that folder, which takes PUT too and sends no hidden headers; yields its address."""
    handler = functools.partial(_Handler, directory=str(folder), hidden=hidden)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: object, hidden: Sequence[str], **named: object):
        self.hidden = hidden
        super().__init__(*args, **named)

    def send_header(self, keyword: str, value: str) -> None:
        if keyword not in self.hidden:
            super().send_header(keyword, value)

    def do_PUT(self) -> None:
        name = Path(self.path).name
        (Path(self.directory) / name).write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(201)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""
