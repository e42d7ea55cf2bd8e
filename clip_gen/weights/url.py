"""Opens URLs. A silent or a slow server cannot hold the reader for long, and a URL that a stranger named can be
restricted to public addresses.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import socket
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

URLS = ("http://", "https://", "data:")
TIMEOUT_SECONDS = 60  # to connect, and without a byte from the server
DEADLINE_SECONDS = 30 * 60  # for a whole download, from opening to the last read
ASK_SECONDS = 1  # between two looks at should_stop while the server is silent
CONNECT_SECONDS = 10  # to each address of a host that must be public
MAX_ADDRESSES = 3  # of such a host that are tried; whoever owns the name may list hundreds
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Metadata services of Oracle's and Azure's machines. ipaddress takes the first for public before Python 3.11.10.
METADATA = ("192.0.0.0/24", "168.63.129.16/32")
# Reserved for 6to4 relays (RFC 7526) and for documentation (RFC 9637), which ipaddress takes for public.
RESERVED = ("192.88.99.0/24", "3fff::/20")
REFUSED = tuple(map(ipaddress.ip_network, METADATA + RESERVED))
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all IPv6 addresses that are routed on the internet


class RefusedAddressError(OSError):
    """A URL that must be public, but is not."""


def is_url(text: str) -> bool:
    """Whether this is a URL that open_url or a data URL reader takes, rather than a path."""
    return text[:8].lower().startswith(URLS)


def is_public(address: str) -> bool:
    """Whether an IP address is reachable on the public internet, and so no part of the server's own networks.

    An IPv6 address that stands for an IPv4 address (mapped, 6to4, NAT64) counts as the IPv4 address.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in GLOBAL_UNICAST:
            return False
    if any(ip in network for network in REFUSED):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


@dataclass(frozen=True)
class PublicOnly:
    """Connects by https to public addresses only. Give it to open_url for a URL that a stranger named.

    resolve: as socket.getaddrinfo. public: tells whether an address may be connected to.
    """

    resolve: Callable[..., list[tuple]] = socket.getaddrinfo
    public: Callable[[str], bool] = is_public

    def addresses(self, host: str, port: int) -> list[str]:
        """The host's IP addresses. RefusedAddressError if any is not public, OSError if there is none."""
        found = [entry[4][0] for entry in self.resolve(host, port, type=socket.SOCK_STREAM)]
        for address in found:
            if not self.public(address):
                raise RefusedAddressError(f"{host} has the address {address}, which is not public")
        return found

    def connect(self, address: tuple[str, int], timeout: float, source_address: None = None) -> socket.socket:
        """As socket.create_connection. The name is resolved once, so the address checked is the address used."""
        host, port = address
        reason: OSError = RefusedAddressError(f"{host} has no address")
        for number in self.addresses(host, port)[:MAX_ADDRESSES]:
            try:
                connection = socket.create_connection((number, port), CONNECT_SECONDS)
            except OSError as error:
                reason = error
                continue
            connection.settimeout(timeout)
            return connection
        raise reason

    def check_behind_proxy(self, host: str) -> None:
        """RefusedAddressError if the host is an address that is not public, or resolves to one here.

        The proxy resolves the name itself, so a name that this machine cannot resolve passes.
        """
        with contextlib.suppress(socket.gaierror):
            self.addresses(host, 443)


def open_url(
    url: str,
    should_stop: Callable[[], bool] | None = None,
    headers: dict[str, str] | None = None,
    deadline_seconds: float | None = None,
    public: PublicOnly | None = None,
) -> http.client.HTTPResponse:
    """The reply to a GET by http or https, through the proxy of $http_proxy or $https_proxy where there is one.

    Opening and reading raise OSError, HTTPException or ValueError, and soon after should_stop says so. public: refuses
    plain http and addresses that are not public, also after a redirect.
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
        *(urllib.request.ProxyHandler(), urllib.request.UnknownHandler(), _Handler(ask, public)),
        *(urllib.request.HTTPDefaultErrorHandler(), _Redirects()),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener.open(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT_SECONDS)


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Connections whose replies are read by _Reader, headers included."""

    def __init__(self, ask: Callable[[], None], public: PublicOnly | None):
        super().__init__()
        self._ask, self._public = ask, public

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        """Runs for each request and redirect, before a proxy is chosen."""
        if self._public is not None and request.type != "https":
            raise RefusedAddressError(f"{request.full_url[:100]}: only https is allowed")
        request.named_host = request.host
        return self.do_request_(request)

    https_request = http_request

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(self._connection, http.client.HTTPConnection, request), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(self._connection, http.client.HTTPSConnection, request), request)

    def _connection(
        self, kind: type[http.client.HTTPConnection], request: urllib.request.Request, host: str, timeout: float
    ) -> http.client.HTTPConnection:
        connection = kind(host, timeout=timeout)
        connection.response_class = functools.partial(_Response, ask=self._ask)
        if self._public is not None and request.host == request.named_host:
            connection._create_connection = self._public.connect  # http.client has no public name for it
        elif self._public is not None:
            self._public.check_behind_proxy(http.client.HTTPConnection(request.named_host).host)
        return connection


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Reads no body of a redirect. The parent class reads all of it into memory, however long it is."""

    def redirect_request(self, request: urllib.request.Request, reply: io.BufferedIOBase, *args: object) -> object:
        reply.close()
        return super().redirect_request(request, reply, *args)


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
