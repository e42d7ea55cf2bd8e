"""A web server that fails as planned."""

from __future__ import annotations

import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class BadServer(http.server.ThreadingHTTPServer):
    """Sends `files`. `plan` says how each request in turn fails; later requests succeed.

    drop: half of the rest, then a reset. truncate: half, then a normal end. stall: half, then silence.
    ignore: all of it despite the Range header. wrong: other bytes. A number: that status.
    """

    def __init__(self, files: dict[str, bytes], plan: list[str | int], tags: bool = True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.plan, self.tags = files, list(plan), tags
        self.requests: list[tuple[str, str | None]] = []  # path and Range of each request
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def bad_server(files: dict[str, bytes], plan: list[str | int] = (), tags: bool = True) -> Iterator[BadServer]:
    server = BadServer(files, plan, tags)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: BadServer

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Range"]))
        way = self.server.plan.pop(0) if self.server.plan else "well"
        name = self.path.partition("?")[0].rpartition("/")[2]
        if isinstance(way, int) or name not in self.server.files:
            self.send_error(way if isinstance(way, int) else 404)
            return
        content = self.server.files[name]
        if way == "wrong":
            content = bytes(len(content))
        start = self._start(content, way)
        if start >= len(content):
            self.send_error(416)
            return
        self._head(content, start, way)
        rest = content[start:]
        self.wfile.write(rest if way in ("well", "ignore", "wrong") else rest[: len(rest) // 2])
        if way == "stall":
            self.server.closing.wait(20)
        if way == "drop":
            self.wfile.flush()
            time.sleep(0.05)  # a reset discards what the other side has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _start(self, content: bytes, way: str) -> int:
        """Offset of the first byte of the reply."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        current = self.headers["If-Range"] in (None, self._tag(content))
        return int(wanted[1]) if wanted and current and way != "ignore" else 0

    def _head(self, content: bytes, start: int, way: str) -> None:
        partly = self.headers["Range"] is not None and way != "ignore" and start
        self.send_response(206 if partly else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if partly:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.tags:
            self.send_header("ETag", self._tag(content))
        self.end_headers()

    def _tag(self, content: bytes) -> str:
        return f'"{hash(content)}"'

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""
