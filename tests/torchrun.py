"""Commands under a real torchrun: two processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MORTAL = Path(__file__).parent / "mortal.py"


def run(words: list[str], watched: str, logs: Path, **variables: str) -> int:
    """The exit status of a command of clip_gen, run by mortal.py; logs: a new folder for `said`."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"WATCHED": watched, **variables}
    command = [*TORCHRUN, "--local-addr=127.0.0.1", "--redirects=3", f"--log-dir={logs}", str(MORTAL), *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except BaseException:  # such as a test's time limit
            process.terminate()  # and with it its processes
            raise


def said(logs: Path, rank: int, stream: str = "stdout") -> str:
    """What a process has written."""
    return next(logs.glob(f"**/{rank}/{stream}.log")).read_text()
