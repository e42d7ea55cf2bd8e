"""A server under load, with clients that cancel, hang up and send bad inputs. A file for locust:

    python3 -m venv load && load/bin/pip install -r benchmarks/requirements.txt
    load/bin/locust -f benchmarks/load.py --headless --users 40 --run-time 10m --stop-timeout 60

It starts script/serve on a free port of 127.0.0.1 (COG_WEIGHTS names the model) and ends it. Exit status 1 if a
prediction was lost, memory grew by more than a tenth after the third minute, or files were left.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from statistics import mean

import psutil
from locust import HttpUser, between, events, task
from locust.env import Environment

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = Path("/tmp/coglet/predictions")  # Cog's; predict.py removes them a minute after a prediction
NAMES = f"load-{os.getpid()}-"  # of this run's predictions
START_SECONDS, SETTLED_SECONDS, FOLDER_SECONDS, MAX_GROWTH = 300, 180, 65, 0.1
DRAWING = {"prompt": "a large red circle", "num_outputs": 1, "candidates": 4}


class Load:
    """The server, a receiver of its webhooks, and what is counted."""

    def __init__(self) -> None:
        self.replies = self.busy = self.lost = 0
        self.waiting: set[str] = set()  # ids of asynchronous predictions without a last webhook
        self.megabytes: list[tuple[float, float]] = []  # seconds since the start, memory of all the server's processes
        self.scratch = tempfile.mkdtemp(prefix="load-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "PORT": str(port), "TMPDIR": self.scratch}
        with open(f"{self.scratch}.log", "w") as log:
            command = [str(ROOT / "script" / "serve")]
            self.server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=self.receiver.serve_forever, daemon=True).start()
        self.webhook = f"http://127.0.0.1:{self.receiver.server_port}"

    def watch_memory(self) -> None:
        began = time.monotonic()
        while self.server.poll() is None:
            server = psutil.Process(self.server.pid)
            used = sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))
            self.megabytes.append((time.monotonic() - began, used / 2**20))
            time.sleep(1)

    def growth(self) -> float | None:
        """Memory of the last minute, compared with the minute after the third. None if the run was shorter."""
        end = self.megabytes[-1][0] if self.megabytes else 0
        early = [used for at, used in self.megabytes if SETTLED_SECONDS <= at < SETTLED_SECONDS + 60]
        late = [used for at, used in self.megabytes if at > end - 60]
        return mean(late) / mean(early) - 1 if end > SETTLED_SECONDS + 120 else None

    def end(self) -> list[str]:
        """Ends the server. Returns the files that it left."""
        time.sleep(FOLDER_SECONDS)
        self.server.send_signal(signal.SIGTERM)
        self.server.wait(timeout=60)
        self.receiver.shutdown()
        files = [path for path in Path(self.scratch).rglob("*") if path.is_file()]
        return [str(path) for path in (*files, *FOLDERS.glob(f"{NAMES}*"))]


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        load.waiting.discard(message["id"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """No line for each request."""


class Client(HttpUser):
    """A client that repeats 409, as every client of Cog has to."""

    wait_time = between(0, 0.5)

    def ask(self, name: str, method: str, path: str, body: dict, expected: int, **options: object) -> bool:
        """Whether the reply has the expected status. `lost` counts the other replies, and broken connections."""
        while True:
            asked = {"name": name, "json": body, "catch_response": True, **options}
            with self.client.request(method, path, **asked) as reply:
                load.replies += 1
                if reply.status_code == 409:
                    load.busy += 1
                    reply.request_meta["name"] = "409"
                    reply.success()
                    time.sleep(0.1)
                    continue
                is_right = reply.status_code == expected
                if expected == 200 and is_right and path == "/predictions":
                    is_right = reply.json()["status"] == "succeeded"
                if is_right:
                    reply.success()
                else:
                    load.lost += 1
                    reply.failure(f"{reply.status_code} {reply.text[:200] if reply.text else ''}")
                return is_right

    @task(6)
    def draws(self) -> None:
        self.ask("draw", "POST", "/predictions", {"input": DRAWING}, 200)

    @task(2)
    def draws_later(self) -> str:
        name = f"{NAMES}{uuid.uuid4()}"
        body = {"input": DRAWING, "webhook": load.webhook, "webhook_events_filter": ["completed"]}
        load.waiting.add(name)
        if not self.ask("asynchronous", "PUT", f"/predictions/{name}", body, 202, headers={"Prefer": "respond-async"}):
            load.waiting.discard(name)
        return name

    @task(1)
    def cancels(self) -> None:
        name = self.draws_later()
        time.sleep(0.1)
        with self.client.post(f"/predictions/{name}/cancel", name="cancel", catch_response=True) as reply:
            if reply.status_code in (200, 404):  # 404: it has ended already
                reply.success()

    @task(1)
    def hangs_up(self) -> None:
        asked = {"json": {"input": DRAWING | {"candidates": 64}}, "timeout": 0.2, "catch_response": True}
        with self.client.post("/predictions", name="hang up", **asked) as reply:
            reply.success()

    @task(1)
    def sends_bad_inputs(self) -> None:
        self.ask("bad input", "POST", "/predictions", {"input": {"prompt": 5}}, 422)
        self.ask("bad body", "POST", "/predictions", {"input": []}, 422)


@events.init.add_listener
def begin(environment: Environment, **_: object) -> None:
    global load
    load = Load()
    Client.host = load.address
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS and load.server.poll() is None:
        try:
            with urllib.request.urlopen(f"{load.address}/health-check", timeout=10) as reply:
                status = json.load(reply)["status"]
            if status == "READY":
                threading.Thread(target=load.watch_memory, daemon=True).start()
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server did not start; see {load.scratch}.log")


@events.quitting.add_listener
def report(environment: Environment, **_: object) -> None:
    left, growth, drawn = load.end(), load.growth(), environment.stats.get("draw", "POST")
    lost = load.lost + len(load.waiting)
    figures = {
        "requests": load.replies,
        "lost": lost,
        "share_of_409": round(load.busy / max(load.replies, 1), 4),
        "seconds_p50": drawn.get_response_time_percentile(0.5) / 1000,
        "seconds_p99": drawn.get_response_time_percentile(0.99) / 1000,
        "megabytes": round(max((used for _, used in load.megabytes), default=0)),
        "growth_after_3_minutes": growth if growth is None else round(growth, 4),
        "files_left": left[:10],
    }
    print(json.dumps(figures, indent=2))
    environment.process_exit_code = int(bool(lost or left or (growth or 0) > MAX_GROWTH))
