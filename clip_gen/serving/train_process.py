"""Runs `python -m clip_gen train` in a process: prints its lines as they come, and leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from clip_gen.files import COMMAND, ROOT

# glibc's malloc keeps the memory that a step has freed for the next step. Otherwise the system clears new pages in
# every step, which can take as long as the arithmetic on a CPU.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
SPIN = {"GOMP_SPINCOUNT": "100000"}  # idle OpenMP threads stay awake for 0.1 ms, because the steps are short
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ERROR_LINES = 20  # of the log, in the error
MAX_LINE = 2**26  # bytes
MAX_ERROR = 20_000  # characters


class TrainingFailed(RuntimeError):
    """A training ended without weights. The message is its last `train: ...` line.

    status: the exit status as in a shell. log: the other lines.
    """

    def __init__(self, code: int, lines: Iterable[str]):
        self.status = code if code >= 0 else 128 - code
        reason = [line for line in lines if line.startswith("train: ")][-1:]
        self.log = [line for line in lines if line not in reason]
        ended, text = f"the training ended with exit status {self.status}; see above", "\n".join(self.log)
        if code < 0:
            ended = f"the training was ended by {signal.Signals(-code).name}, as by a system that is short of memory"
            text = ""
        super().__init__(reason[0].removeprefix("train: ") if reason else text or ended)

    def with_log(self) -> str:
        """The message and the log: Cog leaves the log out of its reply to a failed request."""
        text = str(self)
        if self.log and self.log != text.split("\n"):
            text = "\n".join([text, "", "The last lines of the log:", *self.log])
        # Cog takes an error that contains "cancelled" for a cancelled training.
        return text[:MAX_ERROR].replace("cancelled", "canceled")


def as_options(values: Mapping[str, object]) -> list[str]:
    """Inputs as options of a command: --seed=7, --flip or --no-flip. None leaves an option out."""
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words.append(f"--{option}={value}")
    return words


async def run_training(
    values: Mapping[str, object], out: Path, command: str = "", shown: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Trains into `out`. When it is cancelled, all processes of the training end at once.

    values: the inputs of train.py. command: what a person typed in a shell. If given, standard error goes to this
    process's, and signals that would end this process go to the training, which then saves a checkpoint.
    shown: replacements in the printed lines, such as for paths that mean nothing to a client.
    Raises TrainingFailed.
    """
    folder = tempfile.gettempdir() if command else str(out.parent)
    temporary = tempfile.mkdtemp(prefix="training-", dir=folder)  # a killed training leaves files there
    options = as_options({name: value for name, value in values.items() if name != "images"})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "clip_gen", "train", str(values["images"]), "--out", str(out), *options),
        *("--watch-stdin", "save" if command else "end"),  # a client's training cannot be resumed
        limit=MAX_LINE,
        stdin=asyncio.subprocess.PIPE,  # closes when this process ends
        stdout=asyncio.subprocess.PIPE,
        stderr=None if command else asyncio.subprocess.STDOUT,
        start_new_session=True,
        env=_environment(temporary, command),
    )
    last_lines: deque[str] = deque(maxlen=ERROR_LINES)
    try:
        if command:
            _pass_on_signals(process)
        async for encoded in process.stdout:
            line = encoded.decode(errors="replace").rstrip()
            for text, replacement in shown.items():
                line = line.replace(text, replacement)
            print(line, flush=True)
            last_lines.append(line)
        code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()  # closes its pipes here, not in a later garbage collection
        shutil.rmtree(temporary, ignore_errors=True)
    if code:
        raise TrainingFailed(code, last_lines)


def _environment(temporary: str, command: str) -> dict[str, str]:
    compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"}
    # PYTHONSAFEPATH: a clip_gen in the current folder is not imported.
    fixed = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": temporary}
    return {**KEEP_MEMORY, **SPIN, **compiled, **os.environ, **fixed, COMMAND: command}


def _pass_on_signals(process: asyncio.subprocess.Process) -> None:
    """Sends signals that would end this process to the training, except ignored ones (nohup ignores SIGHUP)."""

    def pass_on(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, pass_on, number)
