"""weights/url.py against servers that answer slowly or never."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_files import web_server
from public_web import CERTIFICATE, MIRROR, PRIVATE, PUBLIC, Names, counts_as_public, public_web, serving

from clip_gen.weights import url as url_module
from clip_gen.weights.url import PublicOnly, is_public, open_url

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"


@pytest.fixture
def trickle(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server that sends the parameter's text and then one byte every 50 ms without end."""
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
def test_an_endlessly_slow_server_times_out_at_the_deadline(trickle: str) -> None:
    started = time.monotonic()
    with (
        pytest.raises(TimeoutError, match=r"not done after 0\.5 seconds"),
        open_url(trickle, deadline_seconds=0.5) as reply,
    ):
        reply.read(10_000)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("trickle", [b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"], indirect=True)
def test_the_body_of_a_redirect_is_not_read(trickle: str) -> None:
    """A server could fill the memory with it."""
    with pytest.raises(OSError, match="Connection refused"):
        open_url(trickle, deadline_seconds=3)


@pytest.mark.parametrize("trickle", [b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1:1/a\r\n\r\n"], indirect=True)
def test_a_redirect_to_ftp_is_refused(trickle: str) -> None:
    with pytest.raises(OSError, match=r"ftp://127\.0\.0\.1:1/a: only http and https are allowed"):
        open_url(trickle)


@pytest.fixture
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_should_stop_ends_the_wait_for_a_silent_server(silent: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionAbortedError, match="stopped"):
        open_url(silent, should_stop=lambda: time.monotonic() - started > 0.2)
    assert time.monotonic() - started < 5


def test_a_silent_server_times_out(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_module, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.5 seconds"):
        open_url(silent)


def test_the_bytes_read_are_those_sent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(sent := bytes(range(256)) * 4000)
    with web_server(tmp_path) as address, open_url(f"{address}/file") as reply:
        assert reply.read() == sent


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with web_server(tmp_path) as address, pytest.raises(OSError, match="404"):
        open_url(f"{address}/absent")


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *(
            "255.255.255.255",
            "192.0.0.192",
            "168.63.129.16",
            "198.18.0.1",
            "192.88.99.1",
            "3fff::1",
            "::1",
            "::",
            "fe80::1",
            "fe80::1%eth0",
        ),
        *("fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:7f00:1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:7f00:1::"),
    ],
)
def test_private_addresses_are_recognised_in_every_form(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_public_addresses_are_recognised_in_every_form(address: str) -> None:
    assert is_public(address)


@pytest.fixture
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def read(url: str, public: PublicOnly) -> bytes:
    with open_url(url, public=public) as reply:
        return reply.read()


@pytest.mark.usefixtures("_trusted")
def test_a_public_server_may_redirect_to_another() -> None:
    with serving(MIRROR, {"/file": b"weights"}) as mirror:
        redirect = {"/": f"https://mirror.example:{mirror.server_port}/file"}
        with serving(PUBLIC, redirect) as server:
            assert read(f"https://weights.example:{server.server_port}/", public_web()) == b"weights"


PLACES = [
    *("https://127.0.0.1:{}/", "https://localhost:{}/", "https://2130706433:{}/", "https://0x7f.1:{}/"),
    *("https://0177.0.0.1:{}/", "https://127.1:{}/", "https://[::1]:{}/", "https://[::ffff:127.0.0.1]:{}/"),
    *("https://127.0.0.%31:{}/", "https://inside.example:{}/", "https://0:{}/", "https://mixed.example:{}/"),
    *("http://weights.example:{}/", "http://127.0.0.1:{}/", "https://weights.example@127.0.0.1:{}/"),
]


@pytest.mark.usefixtures("_trusted")
@pytest.mark.parametrize("redirected", [False, True], ids=["named", "redirected to"])
@pytest.mark.parametrize("place", PLACES)
def test_no_connection_is_made_to_a_private_address(place: str, redirected: bool) -> None:
    public = public_web(inside_example=[[PRIVATE]], mixed_example=[[PUBLIC, PRIVATE]])
    with serving(PRIVATE, {"/": b"secret"}) as private:
        url = place.format(private.server_port)
        with serving(PUBLIC, {"/": url}) as server:
            named = f"https://weights.example:{server.server_port}/" if redirected else url
            with pytest.raises(OSError, match=r"not public|only https|not known|No address") as error:
                read(named, public)
        assert private.connections == 0
        assert b"secret" not in str(error.value).encode()


@pytest.mark.usefixtures("_trusted")
def test_a_name_is_resolved_once_so_the_checked_address_is_used() -> None:
    names = Names(weights_example=[[PUBLIC], [PRIVATE]])
    with serving(PUBLIC, {"/": b"public"}) as server:
        assert read(f"https://weights.example:{server.server_port}/", PublicOnly(names, counts_as_public)) == b"public"
    assert names.resolved == ["weights.example"]


@pytest.mark.usefixtures("_trusted")
def test_a_certificate_for_another_name_is_refused() -> None:
    public = public_web(other_example=[[PUBLIC]])
    with serving(PUBLIC, {"/": b"weights"}) as server, pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        read(f"https://other.example:{server.server_port}/", public)


@pytest.mark.usefixtures("_trusted")
def test_a_second_address_is_tried_if_the_first_does_not_answer() -> None:
    with serving(PUBLIC, {"/": b"weights"}) as server:
        public = PublicOnly(Names(weights_example=[[MIRROR, PUBLIC]]), counts_as_public)
        assert read(f"https://weights.example:{server.server_port}/", public) == b"weights"


@pytest.mark.usefixtures("_trusted")
@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://weights.example/", ["weights.example"]),
        ("https://known-to-the-proxy.invalid/", ["known-to-the-proxy.invalid"]),
        ("https://127.0.0.1/", []),
        ("https://2130706433/", []),
        ("https://[::1]/", []),
        ("https://localhost/", []),
        ("https://127.0.0.%31/", []),
        ("http://weights.example/", []),
    ],
)
def test_a_proxy_is_not_asked_for_a_private_address(
    url: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy's own address is the operator's choice, and may be private."""
    hosts: list[str] = []
    with serving(PRIVATE, {"asked": hosts}, tls=False) as proxy:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        with pytest.raises(OSError, match=r"not public|only https|502"):
            read(url, public_web())
    assert hosts == asked
