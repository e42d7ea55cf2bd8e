"""Opens URLs with time limits against silent and slow servers, and only at public addresses if that is wanted."""

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
TIMEOUT_SECONDS = 60  # to connect, and to wait for the next byte
DEADLINE_SECONDS = 30 * 60  # for a whole download
ASK_SECONDS = 1  # between two calls of should_stop while the server is silent
CONNECT_SECONDS = 10  # per address of a host that must be public
MAX_ADDRESSES = 3  # of such a host that are tried; a malicious one may list hundreds
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Metadata services of Oracle and Azure, 6to4 relays (RFC 7526) and documentation (RFC 9637). ipaddress counts them as
# public, the first before Python 3.11.10.
REFUSED = [ipaddress.ip_network(net) for net in ("192.0.0.0/24", "168.63.129.16/32", "192.88.99.0/24", "3fff::/20")]
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all IPv6 addresses on the internet


class RefusedAddressError(OSError):
    """The URL must be public but is not."""


def is_url(text: str) -> bool:
    """Whether this is an http, https or data URL and not a path."""
    return text[:8].lower().startswith(URLS)


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, and not in a private network of the server.

    An IPv6 address that contains an IPv4 address (mapped, 6to4, NAT64) counts as that.
    """
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if ip not in GLOBAL_UNICAST:
            return False
    refused = ip.is_multicast or ip.is_reserved or any(ip in network for network in REFUSED)
    return ip.is_global and not refused


@dataclass(frozen=True)
class PublicOnly:
    """Connects by https to public addresses only: for open_url with a URL from a stranger.

    resolve: like socket.getaddrinfo. public: whether a connection to an address is allowed.
    """

    resolve: Callable[..., list[tuple]] = socket.getaddrinfo
    public: Callable[[str], bool] = is_public

    def addresses(self, host: str, port: int) -> list[str]:
        """The host's IP addresses. RefusedAddressError if one is not public, OSError if there is none."""
        addresses = [entry[4][0] for entry in self.resolve(host, port, type=socket.SOCK_STREAM)]
        for address in addresses:
            if not self.public(address):
                raise RefusedAddressError(f"{host} has the address {address}, which is not public")
        return addresses

    def connect(self, address: tuple[str, int], timeout: float, source_address: None = None) -> socket.socket:
        """Like socket.create_connection. Resolves the name once, so that the checked address is the one used."""
        host, port = address
        error: OSError = RefusedAddressError(f"{host} has no address")
        for number in self.addresses(host, port)[:MAX_ADDRESSES]:
            try:
                connection = socket.create_connection((number, port), CONNECT_SECONDS)
                connection.settimeout(timeout)
                return connection
            except OSError as failure:
                error = failure
        raise error


def open_url(
    url: str,
    should_stop: Callable[[], bool] | None = None,
    headers: dict[str, str] | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
    public: PublicOnly | None = None,
) -> http.client.HTTPResponse:
    """The reply to a GET of an http or https URL, through the proxy of $http_proxy or $https_proxy if set.

    Opening and reading raise OSError, HTTPException or ValueError; also when should_stop returns True, which is called
    every ASK_SECONDS. public: refuses plain http and addresses that are not public, also after redirects.
    """
    if not url.isascii():
        raise ValueError("a URL is ASCII; percent-encode what is not")
    deadline = time.monotonic() + deadline_seconds

    def ask() -> None:
        if should_stop is not None and should_stop():
            raise ConnectionAbortedError("stopped")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not done after {deadline_seconds} seconds")

    opener = urllib.request.build_opener(_Handler(ask, public), _Redirects())
    return opener.open(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT_SECONDS)


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens connections whose replies, with their headers, are read by _Reader."""

    def __init__(self, ask: Callable[[], None], public: PublicOnly | None):
        super().__init__()
        self._ask, self._public = ask, public

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        """Called for each request and redirect, before a proxy is chosen."""
        if self._public is not None and request.type != "https":
            raise RefusedAddressError(f"{request.full_url[:100]}: only https is allowed")
        request.named_host = request.host
        return self.do_request_(request)

    https_request = http_request

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(http.client.HTTPConnection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(http.client.HTTPSConnection, request)

    def _open(self, kind: type, request: urllib.request.Request) -> http.client.HTTPResponse:
        def connect(host: str, timeout: float) -> http.client.HTTPConnection:
            connection = kind(host, timeout=timeout)
            connection.response_class = functools.partial(_Response, ask=self._ask)
            if self._public is not None and request.host == request.named_host:
                connection._create_connection = self._public.connect  # http.client has no public way
            elif self._public is not None:  # a proxy connects; this machine may not know the host
                with contextlib.suppress(socket.gaierror):
                    self._public.addresses(http.client.HTTPConnection(request.named_host).host, 443)
            return connection

        return self.do_open(connect, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and reads no body. The parent class would read it into memory."""

    def redirect_request(self, request: urllib.request.Request, reply: io.BufferedIOBase, *args: object) -> object:
        reply.close()
        redirected = super().redirect_request(request, reply, *args)
        if redirected.type not in ("http", "https"):
            raise RefusedAddressError(f"{redirected.full_url[:100]}: only http and https are allowed")
        return redirected


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: object, ask: Callable[[], None], **named: object):
        super().__init__(sock, *args, **named)
        self.fp = io.BufferedReader(_Reader(sock, self.fp.detach(), ask))


class _Reader(io.RawIOBase):
    """Reads a socket, and calls `ask`, which may raise, at least every ASK_SECONDS."""

    def __init__(self, sock: socket.socket, file: io.RawIOBase, ask: Callable[[], None]):
        self._sock, self._file, self._ask = sock, file, ask

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        end, before = time.monotonic() + TIMEOUT_SECONDS, self._sock.gettimeout()
        self._sock.settimeout(ASK_SECONDS)
        try:
            while True:
                self._ask()
                try:
                    return self._sock.recv_into(buffer)
                except TimeoutError:
                    if time.monotonic() > end:
                        raise TimeoutError(f"nothing came for {TIMEOUT_SECONDS} seconds") from None
        finally:
            self._sock.settimeout(before)

    def close(self) -> None:
        self._file.close()  # the socket closes with its last file
        super().close()
