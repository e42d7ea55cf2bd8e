"""script/serve from the client's side: requests one after another and at once, and the time to start.

    script/bench --only http start [--device cpu]

The server runs the bundled model on a free port of 127.0.0.1.
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

from benchmarks.figures import Figure
from benchmarks.models import PROMPT, ROOT, Subject

REQUESTS = 8
MIN_RATIO = 3  # seconds of requests one after another / seconds of the same requests at once
MAX_START, MAX_IMPORT, TIMEOUT = 5.0, 0.2, 300.0  # seconds


def http(subject: Subject) -> list[Figure]:
    """Eight requests of 1 to 4 candidates, one after another ("plain") and at once ("ours"); one of 16 candidates."""
    with server(subject) as (address, _):

        def ask(number: int) -> list[str]:
            count = number % 4 + 1
            return predict(address, seed=number, candidates=count, num_outputs=count)

        ask(0)
        sixteen = median(elapsed(lambda: predict(address, candidates=16)) for _ in range(subject.times))
        # On a GPU rounding depends on the batch size, which changes some pictures.
        exact = subject.device.type == "cpu"
        return [at_once(ask, subject.times, exact), Figure("one request of 16 candidates", sixteen)]


def at_once(ask: Callable[[int], object], times: int, exact: bool = True) -> Figure:
    """Medians of several rounds.

    exact: raises RuntimeError if an answer depends on other requests; otherwise prints how many do.
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
        raise RuntimeError("a request was answered differently beside other requests")
    if differing:
        print(f"answers that differ from the first to the same request: {differing} of {len(answers) * REQUESTS}")
    name = f"{REQUESTS} requests at once, plain one after another"
    return Figure(name, *(median(column) for column in zip(*rounds, strict=True)), MIN_RATIO)


def start(subject: Subject) -> list[Figure]:
    """Seconds until script/serve is READY, and seconds of imports."""
    taken = []
    for _ in range(subject.times):
        with server(subject) as (_, ready):
            taken.append(ready)
    return [
        Figure("script/serve to READY", median(taken), max_seconds=MAX_START),
        Figure("import clip_gen", import_seconds("import clip_gen"), max_seconds=MAX_IMPORT),
        Figure("from clip_gen import ClipGen, with torch", import_seconds("from clip_gen import ClipGen")),
    ]


def import_seconds(statement: str, times: int = 5) -> float:
    """Median seconds of the statement in a new interpreter, without the start of the interpreter."""
    interpreter_seconds(statement)  # compiles the modules to bytecode
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
    """Starts script/serve with this model and ends it afterwards; yields its address and the seconds until READY."""
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
                if process.poll() is not None or status == "SETUP_FAILED" or time.perf_counter() - began > TIMEOUT:
                    raise RuntimeError(f"script/serve: {status}\n{Path(log.name).read_text()}")
                time.sleep(0.02)
            yield address, time.perf_counter() - began
        finally:
            terminate(process)


def health(address: str) -> str | None:
    """The status that the server reports; None while it does not answer."""
    try:
        with urllib.request.urlopen(f"{address}/health-check", timeout=10) as reply:
            return json.load(reply)["status"]
    except OSError:
        return None


def terminate(process: subprocess.Popen, patience: float = 10.0) -> None:
    """Ends the process group by SIGTERM, and by SIGKILL after `patience` seconds."""
    began = time.monotonic()
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() - began < patience:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def predict(address: str, seed: int = 0, **inputs: int) -> list[str]:
    """The pictures of a prediction as data URLs. Repeats the request while Cog answers 409: all slots are taken."""
    body = json.dumps({"input": {"prompt": PROMPT, "seed": seed, **inputs}}).encode()
    request = urllib.request.Request(f"{address}/predictions", body, {"Content-Type": "application/json"})
    began = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != 409 or time.monotonic() - began > TIMEOUT:
                raise
            time.sleep(0.005)
        else:
            if answer["status"] != "succeeded":
                raise RuntimeError(f"a prediction {answer['status']}: {answer.get('error')}")
            return answer["output"]
