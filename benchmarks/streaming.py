"""Memory and disk of a training on WebDataset shards that are larger than both.

    python -m benchmarks streaming [--pictures 5000] [--model FOLDER] [--shard-gb 1.5] [--out streaming.json]

Trains on JPEGs of some 4 MB from a server on this machine, which makes them as they are asked for: one pass of stage 1
over the kept copies, then the encoding of all pictures. The default is a data set of 20 GB. `--shard-gb 0.1` keeps
fewer, so that the shards are read twice.
"""

from __future__ import annotations

import argparse
import http.server
import io
import json
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.figures import RESULTS, machine, markdown
from benchmarks.models import BUNDLED
from clip_gen.hardware import choose_device
from clip_gen.training.datasets import open_rows
from clip_gen.training.fit import Machine
from clip_gen.training.job import Training
from clip_gen.training.plan import TrainSettings

SIDES = (3200, 2400)
OF_A_SHARD = 50  # pictures
BATCH = 8
PLAIN_PHOTOGRAPHS = 4  # of which all others are made
TABLE = b"\xff\xdb"  # marker of a JPEG's quantization table
END_OF_TAR = bytes(1024)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks streaming", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--model", default=BUNDLED, help="the base, a model folder")
    parser.add_argument("--shard-gb", type=float, default=1.5, help="of copies of pictures on the disk")
    parser.add_argument("--out", type=Path, default=RESULTS / "streaming.json", help="a JSON file")
    arguments = parser.parse_args(words)
    row = measure(arguments.pictures, str(arguments.model), arguments.shard_gb)
    arguments.out.write_text(json.dumps({"machine": machine(choose_device()), "row": row}, indent=1) + "\n")
    print(markdown([row], list(row)))


def measure(pictures: int, model: str, shard_gb: float) -> dict[str, object]:
    options = {"tokens": "keep", "crop": False, "flip": False, "transformer_steps": 2, "batch_size": BATCH}
    settings = TrainSettings(base=model, vqgan_steps=-(-pictures // BATCH), **options)  # one pass
    shards = -(-pictures // OF_A_SHARD)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Shards)
    server.pictures, server.sent = pictures, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        began, out = time.monotonic(), Path(folder) / "out"
        urls = [f"http://127.0.0.1:{server.server_port}/{number:06d}.tar" for number in range(shards)]
        Training(urls, out, settings, Machine(shard_gb=shard_gb)).run()
        disk, copies = (size_of(place) for place in (out, out / "work" / "pictures"))
        encoded = len(open_rows(out / "work" / "encoded" / "tokens-learnt.json"))
    server.shutdown()
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    size = sum(len(photograph(number)) for number in range(PLAIN_PHOTOGRAPHS)) / PLAIN_PHOTOGRAPHS
    return {
        "pictures": pictures,
        "GB of shards": round(pictures * size / 1e9, 3),
        "GB sent": round(server.sent / 1e9, 3),
        "encoded": encoded,
        "GB of memory": round(memory * 1024 / 1e9, 3),  # pages shared with the largest worker count twice
        "GB of disk": round(disk / 1e9, 4),
        "GB of copies": round(copies / 1e9, 4),
        "minutes": round((time.monotonic() - began) / 60, 2),
    }


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class _Shards(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        first = int(self.path.strip("/").removesuffix(".tar")) * OF_A_SHARD
        self.send_response(200)
        self.end_headers()
        for number in range(first, min(first + OF_A_SHARD, self.server.pictures)):
            content = photograph(number)
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = len(content)
            self.wfile.write(member.tobuf() + content + bytes(-len(content) % 512))
            self.server.sent += len(content)
        self.wfile.write(END_OF_TAR)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that has enough closes the connection
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def photograph(number: int) -> bytes:
    """A JPEG of about 4 MB. Other numbers give other pixels, by other factors in the quantization tables."""
    plain, change = number % PLAIN_PHOTOGRAPHS, number // PLAIN_PHOTOGRAPHS
    content = bytearray(_plain_photograph(plain))
    for table, place in enumerate(_tables(bytes(content))):
        content[place] = 4 + change // 40**table % 40  # the first factor is that of a block's mean
    return bytes(content)


def _tables(content: bytes) -> Iterator[int]:
    """The places of the first factor of both quantization tables."""
    place = content.find(TABLE)
    while place >= 0:
        yield place + 5
        place = content.find(TABLE, place + 67)


@cache
def _plain_photograph(number: int) -> bytes:
    width, height = SIDES
    rng = np.random.default_rng(number)
    rough = Image.fromarray(rng.integers(0, 256, (height // 60, width // 60, 3), np.uint8))
    smooth = np.asarray(rough.resize(SIDES, Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-16, 17, (height, width, 3), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()
