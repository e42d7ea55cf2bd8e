"""script/serve as clients see it: requests one after another and at once, and how soon it is there.

    script/bench --only http start [--device cpu]

The server runs the bundled model in a process group of its own, on a free port of 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from figures import Figure
from subjects import PROMPT, ROOT, Subject

REQUESTS = 8
LEAST_RATIO = 3  # of requests one after another to the same at once
MOST_START, MOST_IMPORT = 5.0, 0.2  # seconds
GIVE_UP = 300.0  # seconds


def http(subject: Subject) -> list[Figure]:
    """Eight requests of 1 to 4 candidates one after another ("plain") and at once ("ours"); and one of sixteen."""
    with server(subject) as (address, _):

        def ask(number: int) -> list[str]:
            count = number % 4 + 1
            return predict(address, seed=number, candidates=count, num_outputs=count)

        ask(0)
        sixteen = median(elapsed(lambda: predict(address, candidates=16)) for _ in range(subject.times))
        # On a GPU rounding depends on how many rows there are, and some pictures are others then.
        exact = subject.device.type == "cpu"
        return [at_once(ask, subject.times, exact), Figure("one request of 16 candidates", sixteen)]


def at_once(ask: Callable[[int], object], times: int, exact: bool = True) -> Figure:
    """Medians of several rounds. exact: RuntimeError if a request is answered differently with others beside it; else
    how many were is printed.
    """
    numbers, answers = range(REQUESTS), []

    def alone() -> None:
        answers.append([ask(number) for number in numbers])

    def together() -> None:
        with ThreadPoolExecutor(REQUESTS) as pool:
            answers.append(list(pool.map(ask, numbers)))

    rounds = [(elapsed(together), elapsed(alone)) for _ in range(times)]
    differing = sum(answer != first for row in answers for answer, first in zip(row, answers[0], strict=True))
    if differing and exact:
        raise RuntimeError("a request was answered differently at once with others than alone")
    if differing:
        print(f"answers that differ from the first to the same request: {differing} of {len(answers) * REQUESTS}")
    name = f"{REQUESTS} requests at once, plain one after another"
    return Figure(name, *(median(column) for column in zip(*rounds, strict=True)), LEAST_RATIO)


def start(subject: Subject) -> list[Figure]:
    """Seconds from starting script/serve to READY, and what imports take beyond an interpreter that does nothing."""
    taken = []
    for _ in range(subject.times):
        with server(subject) as (_, ready):
            taken.append(ready)
    return [
        Figure("script/serve to READY", median(taken), most_seconds=MOST_START),
        Figure("import clip_gen", import_seconds("import clip_gen"), most_seconds=MOST_IMPORT),
        Figure("from clip_gen import ClipGen, with torch", import_seconds("from clip_gen import ClipGen")),
    ]


def import_seconds(statement: str, times: int = 5) -> float:
    """Seconds a fresh interpreter takes for the statement beyond one that is given nothing to do; medians."""
    interpreter_seconds(statement)  # what it compiles is kept for the next
    pairs = [(interpreter_seconds(statement), interpreter_seconds("pass")) for _ in range(times)]
    return median(full for full, _ in pairs) - median(empty for _, empty in pairs)


def interpreter_seconds(code: str) -> float:
    return elapsed(lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True))


def elapsed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def server(subject: Subject) -> Iterator[tuple[str, float]]:
    """The address of script/serve with this model, and the seconds it took to be READY; its processes end after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, command = f"http://127.0.0.1:{port}", [str(ROOT / "script" / "serve")]
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("w+") as log:
        environment = {**os.environ, "PORT": str(port), "COG_WEIGHTS": str(subject.folder), "TMPDIR": scratch}
        if subject.device.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            while (status := health(address)) != "READY":
                if process.poll() is not None or status == "SETUP_FAILED" or time.perf_counter() - began > GIVE_UP:
                    raise RuntimeError(f"script/serve: {status}\n{Path(log.name).read_text()}")
                time.sleep(0.02)
            yield address, time.perf_counter() - began
        finally:
            end(process)


def health(address: str) -> str | None:
    """What the server says of itself; None while it says nothing."""
    try:
        with urllib.request.urlopen(f"{address}/health-check", timeout=10) as reply:
            return json.load(reply)["status"]
    except OSError:
        return None


def end(process: subprocess.Popen, patience: float = 10.0) -> None:
    """Asks the whole process group to leave, and makes it when these seconds are over."""
    began = time.monotonic()
    with contextlib.suppress(ProcessLookupError):  # all gone
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() - began < patience:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def predict(address: str, seed: int = 0, **inputs: int) -> list[str]:
    """The pictures of a prediction as data URLs. Asks again while all slots are taken, as clients of Cog have to."""
    body = json.dumps({"input": {"prompt": PROMPT, "seed": seed, **inputs}}).encode()
    request = urllib.request.Request(f"{address}/predictions", body, {"Content-Type": "application/json"})
    began = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(request, timeout=GIVE_UP) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != 409 or time.monotonic() - began > GIVE_UP:
                raise
            time.sleep(0.005)
        else:
            if answer["status"] != "succeeded":
                raise RuntimeError(f"a prediction {answer['status']}: {answer.get('error')}")
            return answer["output"]
