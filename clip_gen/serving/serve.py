"""script/serve: writes the schema and starts Cog's HTTP server, if it can listen at its address."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import runpy
import socket
import sys

from clip_gen.files import ROOT, write_text_atomic
from clip_gen.serving.openapi import build_schema

DESCRIPTION = (
    "Starts Cog's HTTP server. PORT=5001 script/serve sets another port, COG_WEIGHTS=... another model: a folder, a "
    "weights tar or its URL. Other options are those of `python -m cog.server.http`."
)


def check_address(host: str, port: str) -> None:
    """Tries to listen there. ValueError with the reason: Cog 0.23.1 answers a bad address with a traceback."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        is_ipv6 = ipaddress.ip_address(bare).version == 6
        if is_ipv6 != host.startswith("["):
            raise ValueError(f"write it as {f'[{bare}]' if is_ipv6 else bare}")
        socket.create_server((bare, int(port)), family=socket.AF_INET6 if is_ipv6 else socket.AF_INET).close()
    except (OSError, OverflowError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) else error
        raise ValueError(
            f"cannot listen on --host {host}, PORT {port} ({reason}); give an IP address, such as 127.0.0.1 for this "
            "machine alone or 0.0.0.0 for others too, and a free port, as in PORT=5001 script/serve"
        ) from error


def write_schema() -> None:
    """Writes this project's schema, unless it is there already: the project's folder may be read-only."""
    text = json.dumps(build_schema(), indent=2, ensure_ascii=False) + "\n"
    path = ROOT / ".cog" / "openapi_schema.json"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        write_text_atomic(path, text)


def main(arguments: list[str]) -> None:
    """Replaces this process by Cog's server. ValueError if it cannot listen."""
    parser = argparse.ArgumentParser("script/serve", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    parser.add_argument("--x-mode", choices=["predict", "train"], default="predict", help="what to serve")
    options, others = parser.parse_known_args(arguments)
    port, weights = os.environ.get("PORT") or "5000", os.environ.get("COG_WEIGHTS", "")
    check_address(options.host, port)
    write_schema()
    slots = runpy.run_path(str(ROOT / "predict.py"))["SLOTS"]
    os.environ |= {
        "PORT": port,
        "COG_WEIGHTS": os.path.abspath(weights) if os.path.exists(weights) else weights,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",  # Cog starts its worker as `python`
        # In an image, Cog's command line sets these. Trainings run one at a time.
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_TRAIN_TYPE_STUB": "train.py:train",
        "COG_MAX_CONCURRENCY": "1" if options.x_mode == "train" else str(slots),
    }
    os.chdir(ROOT)
    server = [sys.executable, "-m", "cog.server.http", "--host", options.host, "--x-mode", options.x_mode, *others]
    os.execv(sys.executable, server)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"script/serve: {error}")
