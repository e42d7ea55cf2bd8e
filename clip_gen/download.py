"""Opens a URL such that neither a silent nor a trickling server can hold the reader for long."""

from __future__ import annotations

import functools
import http.client
import io
import socket
import time
import urllib.request
from collections.abc import Callable

URLS = ("http://", "https://", "data:")  # beginnings of what is no path
TIMEOUT_SECONDS = 60  # to connect, and without a byte from the server
DEADLINE_SECONDS = 30 * 60  # for a whole download, from opening to the last read
ASK_SECONDS = 1  # between two looks at should_stop while the server is silent


def open_url(
    url: str,
    should_stop: Callable[[], bool] | None = None,
    headers: dict[str, str] | None = None,
    deadline_seconds: float | None = None,
) -> http.client.HTTPResponse:
    """The reply to a GET by http or https, through the proxy of $http_proxy or $https_proxy where there is one.

    Opening and reading raise OSError, HTTPException or ValueError, and soon after should_stop says so.
    """
    if not url.isascii():
        raise ValueError("a URL is ASCII; percent-encode what is not")
    seconds = DEADLINE_SECONDS if deadline_seconds is None else deadline_seconds
    deadline = time.monotonic() + seconds

    def ask() -> None:
        if should_stop is not None and should_stop():
            raise ConnectionAbortedError("stopped")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not done after {seconds} seconds")

    # urlopen's own opener would follow a redirect to ftp, which nothing here watches.
    opener = urllib.request.OpenerDirector()
    for handler in (
        *(urllib.request.ProxyHandler(), urllib.request.UnknownHandler(), _Handler(ask)),
        *(urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPRedirectHandler()),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener.open(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT_SECONDS)


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Connections whose replies are read by _Reader, headers included."""

    def __init__(self, ask: Callable[[], None]):
        super().__init__()
        self._ask = ask

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(self._connection, http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(self._connection, http.client.HTTPSConnection), request)

    def _connection(
        self, kind: type[http.client.HTTPConnection], host: str, timeout: float
    ) -> http.client.HTTPConnection:
        connection = kind(host, timeout=timeout)
        connection.response_class = functools.partial(_Response, ask=self._ask)
        return connection


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: object, ask: Callable[[], None], **named: object):
        super().__init__(sock, *args, **named)
        self.fp = io.BufferedReader(_Reader(sock, self.fp.detach(), ask))


class _Reader(io.RawIOBase):
    """Reads a socket, asking before each wait whether to go on."""

    def __init__(self, sock: socket.socket, file: io.RawIOBase, ask: Callable[[], None]):
        self._sock, self._file, self._ask = sock, file, ask

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        patience = time.monotonic() + TIMEOUT_SECONDS
        before = self._sock.gettimeout()
        self._sock.settimeout(ASK_SECONDS)
        try:
            while True:
                self._ask()
                try:
                    return self._sock.recv_into(buffer)
                except TimeoutError:
                    if time.monotonic() > patience:
                        raise TimeoutError(f"nothing came for {TIMEOUT_SECONDS} seconds") from None
        finally:
            self._sock.settimeout(before)

    def close(self) -> None:
        self._file.close()  # the socket counts its open files and closes with the last
        super().close()
