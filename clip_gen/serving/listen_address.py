"""A check of script/serve's host and port: Cog 0.23.1 answers a bad address with a traceback."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import socket
import sys


def check_address(host: str, port: str) -> None:
    """Tries to listen there. ValueError with the value and the remedy."""
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"PORT is {port}; give a number, 1 to 65535")
    bare = host.removeprefix("[").removesuffix("]")
    try:
        is_ipv6 = ipaddress.ip_address(bare).version == 6
    except ValueError:
        remedy = "give an IP address, 127.0.0.1 for this machine alone or 0.0.0.0 for others too"
        raise ValueError(f"--host is {host}; {remedy}") from None
    written = f"[{bare}]" if is_ipv6 else bare
    if host != written:
        raise ValueError(f"--host is {host}; write it as {written}")
    try:
        socket.create_server((bare, int(port)), family=socket.AF_INET6 if is_ipv6 else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} is in use; set another, as in PORT=5001 script/serve") from error
        if error.errno == errno.EACCES:
            raise ValueError(f"port {port} is for root alone; set another, as in PORT=5001 script/serve") from error
        reason = os.strerror(error.errno)
        raise ValueError(f"--host is {host}, where this machine cannot listen ({reason}); try 127.0.0.1") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser("script/serve", add_help=False)  # Cog's server has the other options
    parser.add_argument("--host", default="127.0.0.1")
    try:
        check_address(parser.parse_known_args()[0].host, os.environ.get("PORT") or "5000")
    except ValueError as error:
        sys.exit(f"script/serve: {error}")
