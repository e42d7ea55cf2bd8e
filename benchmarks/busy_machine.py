"""How much other processes slow down sampling, compared with a loop of matrix products on one thread.

    .venv/bin/python -m benchmarks busy-machine [--before FOLDER] [--out benchmarks/results/busy.json]

Samples 16 candidates of the bundled model on the CPU beside 0, 2, 4 and 8 busy processes, in turn with the loop and,
with --before, with the version in another checkout. Targets: beside other processes, sampling slows down at most 1.5
times as much as the loop; without them, it takes at most 1.3 times as long as the version before. Run it on an idle
machine; the load average at the start is saved with the figures.
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

from benchmarks.figures import RESULTS, machine, markdown
from clip_gen.files import ROOT

MAX_SLOWDOWN, MAX_QUIET = 1.5, 1.3
LOOP, OURS, BEFORE = "loop", "ours", "before"
SETTLING = 0.3  # seconds between the start of the other processes and the first measurement

# Ends when its parent ends.
COMPUTES = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(100_000))\n"
# Does its work once for every line on stdin; prints the seconds and the result.
WORKER = """
import hashlib, sys, time
import torch
{setup}
work()
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    result = work()
    print(time.perf_counter() - began, result, flush=True)
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
    """A process that repeats its work on request, in a checkout and with the environment of its script/predict."""

    def __init__(self, setup: str, checkout: Path = ROOT):
        command = "source <(grep '^export .*MKL_CBWR' script/predict) && exec \"$@\""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))
        }
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", sys.executable, "-c", WORKER.format(setup=setup)],
            cwd=checkout,
            env={**environment, "PYTHONPATH": str(checkout)},
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
        """Seconds and result."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, result = self._answer().split()
        return float(seconds), result

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the benchmark ended with status {self.process.wait()}; see above")
        return line


@contextmanager
def others(count: int) -> Iterator[None]:
    """Runs this many busy processes, each with one thread."""
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTES, str(os.getpid())]) for _ in range(count)]
    try:
        time.sleep(SETTLING)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured(counts: list[int], repeats: int, before: Path | None) -> tuple[dict[int, dict[str, float]], bool]:
    """Median seconds by number of other processes and worker; and whether all pictures were the same."""
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
                        taken, result = worker.work()
                        seconds[count].setdefault(name, []).append(taken)
                        if name != LOOP:
                            pictures.add(result)
    return {count: {name: median(all_) for name, all_ in by.items()} for count, by in seconds.items()}, len(
        pictures
    ) == 1


def rows(medians: dict[int, dict[str, float]]) -> list[dict[str, object]]:
    """A row per number of other processes: seconds, slowdown relative to none, and whether the target is met."""
    quiet, table = medians[0], []
    for count, seconds in medians.items():
        row: dict[str, object] = {"others": count} | {f"{name} seconds": round(of, 3) for name, of in seconds.items()}
        for name in (OURS, BEFORE):
            if name in seconds and count:
                slowdown = seconds[name] / quiet[name] / (seconds[LOOP] / quiet[LOOP])
                row[f"{name}: slowdown / loop's"] = round(slowdown, 2)
        if count:
            row["met"] = row[f"{OURS}: slowdown / loop's"] <= MAX_SLOWDOWN
        elif BEFORE in seconds:
            row["ours / before"] = round(seconds[OURS] / seconds[BEFORE], 2)
            row["met"] = row["ours / before"] <= MAX_QUIET
        table.append(row)
    return table


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks busy-machine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--others", type=int, nargs="+", default=[2, 4, 8], help="how many other processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "busy.json")
    arguments = parser.parse_args(words)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is not idle (load {load:.1f}): the figures for 0 processes are too slow", file=sys.stderr)
    counts = [0, *sorted({count for count in arguments.others if count > 0})]
    medians, same = measured(counts, arguments.repeats, arguments.before and arguments.before.resolve())
    results = rows(medians)
    print(markdown(results, list(dict.fromkeys(name for row in results for name in row))))
    print(f"all pictures the same: {'yes' if same else 'NO'}")
    facts = {"machine": machine(torch.device("cpu")) | {"load": load}, "repeats": arguments.repeats}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**facts, "same_pictures": same, "rows": results}, indent=1) + "\n")
