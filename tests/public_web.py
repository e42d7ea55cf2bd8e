"""Local servers that act as the public internet and as the private network of a server.

127.0.0.2 and 127.0.0.3 count as public addresses, 127.0.0.1 as private.
"""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clip_gen.weights.url import PublicOnly, is_public

TLS = Path(__file__).parent / "fixtures" / "tls"  # valid for weights.example and mirror.example
CERTIFICATE = TLS / "certificate.pem"  # SSL_CERT_FILE must name it, or no client trusts the servers
PUBLIC, MIRROR, PRIVATE = "127.0.0.2", "127.0.0.3", "127.0.0.1"


def counts_as_public(address: str) -> bool:
    return address in (PUBLIC, MIRROR) or is_public(address)


class Names:
    """A resolver for these names, with the lists of addresses it returns in turn. Other names are resolved as usual."""

    def __init__(self, **answers: list[list[str]]):
        self.answers = {name.replace("_", "."): list(lists) for name, lists in answers.items()}
        self.resolved: list[str] = []

    def __call__(self, host: str, port: int, **named: int) -> list[tuple]:
        self.resolved.append(host)
        if host not in self.answers:
            return socket.getaddrinfo(host, port, **named)
        lists = self.answers[host]
        addresses = lists.pop(0) if len(lists) > 1 else lists[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


def public_web(**answers: list[list[str]]) -> PublicOnly:
    return PublicOnly(Names(weights_example=[[PUBLIC]], mirror_example=[[MIRROR]], **answers), counts_as_public)


class Server(http.server.ThreadingHTTPServer):
    """Sends `files`; a string is the target of a redirect. Counts connections."""

    daemon_threads = True

    def __init__(self, address: str, files: Mapping[str, bytes | str], tls: bool = True):
        super().__init__((address, 0), _Handler)
        self.files, self.connections = files, 0
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE, TLS / "key.pem")
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def get_request(self) -> tuple[socket.socket, object]:
        self.connections += 1
        return super().get_request()

    def handle_error(self, *inputs: object) -> None:
        """Keeps the test's output clean."""


@contextmanager
def serving(address: str, files: Mapping[str, bytes | str], tls: bool = True) -> Iterator[Server]:
    server = Server(address, files, tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        found = self.server.files.get(self.path)
        if found is None:
            self.send_error(404)
        elif isinstance(found, str):
            self.send_response(302)
            self.send_header("Location", found)
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(found)

    def do_CONNECT(self) -> None:
        """Acts as a proxy that can reach every host."""
        host, _, _ = self.path.rpartition(":")
        self.server.files["asked"].append(host)
        self.send_error(502)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test's output clean."""
