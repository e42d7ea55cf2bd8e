"""Speed of prediction beside a plain float32 reference with the same weights.

    script/bench [--device cpu|cuda|auto] [--size bundled published] [--only NAME ...] [--out results.json]

Prints a table for each part and saves it in benchmarks/results/, in a file named after the processor or the GPU. A
repeated part replaces its earlier result. bundled: checkpoints/shapes. published: the sizes of HFAiLab's and OpenAI's
networks with random weights; this writes a temporary folder of 1 GB. The parts loading, prediction, http and start
measure the bundled model only.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import prediction_speed, server_speed, token_speed
from benchmarks.figures import RESULTS, Figure, machine, save, table
from benchmarks.models import BUNDLED, Subject, write_published
from clip_gen.hardware import choose_device

ANY_SIZE: dict[str, Callable[[Subject], list[Figure]]] = {
    "sampling": token_speed.measure,
    "decoding": prediction_speed.decoding,
}
PARTS: dict[str, Callable[[Subject], list[Figure]]] = {
    **ANY_SIZE,
    "loading": prediction_speed.loading,
    "prediction": prediction_speed.prediction,
    "http": server_speed.http,
    "start": server_speed.start,
}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "script/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="auto")
    parser.add_argument("--size", nargs="+", choices=["bundled", "published"], default=["bundled", "published"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="another JSON file")
    arguments = parser.parse_args(words)
    if arguments.size == ["published"] and not ANY_SIZE.keys() & set(arguments.only):
        parser.error(f"{' '.join(arguments.only)}: measures the bundled model only; leave out --size published")
    device = choose_device(arguments.device)
    facts = machine(device)
    hardware = facts["processor" if device.type == "cpu" else "device"]
    out = arguments.out or RESULTS / f"{file_name(hardware)}.json"
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    for size in arguments.size:
        parts = [name for name in arguments.only if size == "bundled" or name in ANY_SIZE]
        with tempfile.TemporaryDirectory() as folder:
            if parts:
                measure(parts, subject(size, device, Path(folder)), facts, out)
    print(f"\n{out}")


def subject(size: str, device: torch.device, folder: Path) -> Subject:
    if size == "bundled":
        return Subject(size, BUNDLED, device)
    published = Subject(size, folder / size, device, times=3 if device.type == "cuda" else 1)
    published.run(lambda: write_published(published.folder))
    return published


def measure(parts: list[str], subject: Subject, facts: dict[str, object], out: Path) -> None:
    for part in parts:
        figures = PARTS[part](subject)
        save(out, f"{part}, {subject.size}", facts, figures)
        print(f"\n{part}, {subject.size}\n\n{table(figures)}", flush=True)


def file_name(device: str) -> str:
    """The name of a processor or a GPU as a file name: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
