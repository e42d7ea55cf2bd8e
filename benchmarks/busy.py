"""How much other processes slow down drawing, beside how much they slow down a loop of matrix products on one thread.

    PYTHONPATH=. .venv/bin/python benchmarks/busy.py [--before FOLDER] [--out benchmarks/results/busy.json]

Draws 16 candidates of the bundled model on the CPU beside 0, 2, 4 and 8 processes that only compute, in turn with the
loop and, with --before, with the version in another checkout. The bars: beside other processes, drawing slows down at
most 1.5 times as much as the loop; without them, it takes at most 1.3 times as long as the version before. The figures
mean something only on a machine where nothing else runs; the load at the start is printed and saved.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch
from figures import machine

ROOT = Path(__file__).resolve().parent.parent
MOST_SLOWDOWN, MOST_QUIET = 1.5, 1.3
LOOP, OURS, BEFORE = "loop", "ours", "before"
SETTLING = 0.3  # seconds from the start of other processes until the first measurement

# Ends with the process that started it, however that ends.
COMPUTES = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(100_000))\n"
# Each does its work once for every line it reads, and answers with the seconds and what came of it.
WORKER = """
import hashlib, sys, time
import torch
{setup}
work()
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    found = work()
    print(time.perf_counter() - began, found, flush=True)
"""
MULTIPLIES = """
torch.set_num_threads(1)
x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))

def work():
    for _ in range(200):
        x @ x
"""
DRAWS = """
from clip_gen import ClipGen
model = ClipGen.load("checkpoints/shapes", device="cpu")

def work():
    images = model.generate("a large red circle on a white background", candidates=16, num_outputs=16, seed=7).images
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
"""


class Worker:
    """A process that repeats its work when asked. It runs in a checkout, in the environment of its script/predict."""

    def __init__(self, setup: str, checkout: Path = ROOT):
        command = "source <(grep '^export .*MKL_CBWR' script/predict) && exec \"$@\""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", sys.executable, "-c", WORKER.format(setup=setup)],
            cwd=checkout,
            env={**mine, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def work(self) -> tuple[float, str]:
        """Seconds, and what came of it."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, found = self._answer().split()
        return float(seconds), found

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with status {self.process.wait()}; see above")
        return line


@contextmanager
def others(count: int) -> Iterator[None]:
    """So many processes that only compute, each on one thread."""
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTES, str(os.getpid())]) for _ in range(count)]
    try:
        time.sleep(SETTLING)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured(counts: list[int], repeats: int, before: Path | None) -> tuple[dict[int, dict[str, float]], bool]:
    """Median seconds by number of other processes and by worker; and whether all pictures were the same."""
    seconds: dict[int, dict[str, list[float]]] = {count: {} for count in counts}
    pictures = set()
    with ExitStack() as stack:
        workers = {LOOP: stack.enter_context(Worker(MULTIPLIES)), OURS: stack.enter_context(Worker(DRAWS))}
        if before:
            workers[BEFORE] = stack.enter_context(Worker(DRAWS, before))
        for _ in range(repeats):
            for count in counts:
                with others(count):
                    for name, worker in workers.items():
                        taken, found = worker.work()
                        seconds[count].setdefault(name, []).append(taken)
                        if name != LOOP:
                            pictures.add(found)
    return {count: {name: median(of) for name, of in by.items()} for count, by in seconds.items()}, len(pictures) == 1


def rows(medians: dict[int, dict[str, float]]) -> list[dict[str, object]]:
    """A row for each number of other processes: seconds, slowdowns against none, and whether the bar is met."""
    quiet, made = medians[0], []
    for count, seconds in medians.items():
        row: dict[str, object] = {"others": count} | {f"{name} seconds": round(of, 3) for name, of in seconds.items()}
        for name in (OURS, BEFORE):
            if name in seconds and count:
                slowdown = seconds[name] / quiet[name] / (seconds[LOOP] / quiet[LOOP])
                row[f"{name}: slowdown / loop's"] = round(slowdown, 2)
        if count:
            row["met"] = row[f"{OURS}: slowdown / loop's"] <= MOST_SLOWDOWN
        elif BEFORE in seconds:
            row["ours / before"] = round(seconds[OURS] / seconds[BEFORE], 2)
            row["met"] = row["ours / before"] <= MOST_QUIET
        made.append(row)
    return made


def table(rows: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--others", type=int, nargs="+", default=[2, 4, 8], help="how many other processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "busy.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"the machine is busy already (load {load:.1f}): the figures for 0 processes are too slow", file=sys.stderr
        )
    counts = [0, *sorted({count for count in arguments.others if count > 0})]
    medians, same = measured(counts, arguments.repeats, arguments.before and arguments.before.resolve())
    found = rows(medians)
    print(table(found))
    print(f"all pictures the same: {'yes' if same else 'NO'}")
    kept = {"machine": machine(torch.device("cpu")) | {"load": load}, "repeats": arguments.repeats}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**kept, "same_pictures": same, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
