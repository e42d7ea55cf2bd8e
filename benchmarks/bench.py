"""Every benchmark of speed, one after another: ours beside a plain float32 reference with the same weights.

    script/bench [--device cpu|cuda|auto] [--size bundled published] [--only NAME ...] [--out results.json]

Prints a table for each part and keeps it in benchmarks/results/, in a file named after the processor or the GPU. A part
that is measured again takes its old place there. bundled: checkpoints/shapes. published: HFAiLab's and OpenAI's sizes
with random weights, for which a folder of 1 GB is written and deleted again. Loading, prediction, http and start are
measured of the bundled model alone.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import prediction
import profiling
import sampling
import serving
import torch
from figures import Figure, keep, machine, table
from subjects import BUNDLED, Subject, write_published

from clip_gen.hardware import choose_device

RESULTS = Path(__file__).resolve().parent / "results"

ANY_SIZE: dict[str, Callable[[Subject], list[Figure]]] = {
    "sampling": sampling.measure,
    "decoding": prediction.decoding,
    "profile": profiling.measure,
}
PARTS: dict[str, Callable[[Subject], list[Figure]]] = {
    **ANY_SIZE,
    "loading": prediction.loading,
    "prediction": prediction.whole,
    "http": serving.http,
    "start": serving.start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda", "auto"], default="auto")
    parser.add_argument("--size", nargs="+", choices=["bundled", "published"], default=["bundled", "published"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="another JSON file")
    arguments = parser.parse_args()
    if arguments.size == ["published"] and not ANY_SIZE.keys() & set(arguments.only):
        parser.error(f"{' '.join(arguments.only)}: of the bundled model alone; leave out --size published")
    device = choose_device(arguments.device)
    facts = machine(device)
    named_after = facts["processor" if device.type == "cpu" else "device"]
    out = arguments.out or RESULTS / f"{file_name(named_after)}.json"
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    for size in arguments.size:
        parts = [name for name in arguments.only if size == "bundled" or name in ANY_SIZE]
        with tempfile.TemporaryDirectory() as scratch:
            if parts:
                measure(parts, subject(size, device, Path(scratch)), facts, out)
    print(f"\n{out}")


def subject(size: str, device: torch.device, scratch: Path) -> Subject:
    if size == "bundled":
        return Subject(size, BUNDLED, device)
    published = Subject(size, scratch / size, device, times=3 if device.type == "cuda" else 1)
    published.run(lambda: write_published(published.folder))
    return published


def measure(parts: list[str], subject: Subject, facts: dict[str, object], out: Path) -> None:
    for part in parts:
        figures = PARTS[part](subject)
        keep(out, f"{part}, {subject.size}", facts, figures)
        print(f"\n{part}, {subject.size}\n\n{table(figures)}", flush=True)


def file_name(device: str) -> str:
    """A processor's or a GPU's name as part of a file's: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    main()
