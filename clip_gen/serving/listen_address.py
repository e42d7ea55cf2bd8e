"""Whether script/serve can listen where it is told to: Cog 0.23.1 answers a bad address with a traceback."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence


def check_address(host: str, port: str) -> None:
    """Raises ValueError with the value and the remedy, after a try to listen there."""
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"PORT is {port}; give a number, 1 to 65535")
    bare = host.removeprefix("[").removesuffix("]")
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        remedy = "give an IP address, 127.0.0.1 for this machine alone or 0.0.0.0 for others too"
        raise ValueError(f"--host is {host}; {remedy}") from None
    wanted = bare if version == 4 else f"[{bare}]"
    if host != wanted:
        raise ValueError(f"--host is {host}; write it as {wanted}")
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    try:
        socket.create_server((bare, int(port)), family=family).close()
    except OSError as error:
        another = "set another, as in PORT=5001 script/serve"
        reasons = {
            errno.EADDRINUSE: f"port {port} is in use; {another}",
            errno.EACCES: f"port {port} is for root alone; {another}",
        }
        unusable = f"--host is {host}, where this machine cannot listen ({os.strerror(error.errno)}); try 127.0.0.1"
        raise ValueError(reasons.get(error.errno, unusable)) from error


def main(arguments: Sequence[str]) -> int:
    """arguments: those of Cog's server. 1 and a sentence on stderr when it could not listen."""
    parser = argparse.ArgumentParser("script/serve", add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    for names in (("-h", "--help"), ("-v", "--version")):
        parser.add_argument(*names, action="store_true")
    options, _ = parser.parse_known_args(arguments)
    if options.help or options.version:
        return 0
    try:
        check_address(options.host, os.environ.get("PORT") or "5000")
    except ValueError as error:
        print(f"script/serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
