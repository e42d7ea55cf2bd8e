"""Trainings of Cog's server: one at a time, each in a process that ends with its request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from clip_gen.data.manifest import shown
from clip_gen.files import ROOT, atomic_file, folder_lock, is_writable, set_compile_cache_folders

# Environment variables of trainings. glibc's malloc keeps the memory that a step has freed for the next step. Otherwise
# the system clears new pages in every step, which can take as long as the arithmetic on a CPU. Idle OpenMP threads stay
# awake for 0.1 ms, because the steps are short.
TRAIN_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "GOMP_SPINCOUNT": "100000",
}
ERROR_LINES, ERROR_CHARACTERS = 20, 1000  # how many lines of the log are in the error, and the length of each
MAX_LINE = 2**26  # bytes
KEPT = {"weights.tar": "trained_model.tar", "report.html": "trained_model.html"}
BUSY = "this server trains one model at a time, and a training is under way; try again when it has ended"
RANDOM = re.compile(r"^tmp.{8}")  # Cog's prefix of a downloaded file's name


def as_options(values: Mapping[str, object]) -> list[str]:
    """Values as options of a command: --seed=7, --flip or --no-flip. None leaves an option out."""
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words.append(f"--{option}={value}")
    return words


def train_words(inputs: Mapping[str, object], out: str | Path) -> list[str]:
    """The words after `python -m clip_gen` that train into `out` with the inputs of train.py."""
    settings = {name: value for name, value in inputs.items() if name != "images"}
    return ["train", str(inputs["images"]), f"--out={out}", *as_options(settings)]


async def run_training(inputs: Mapping[str, object], out: Path, replaced: Mapping[str, str]) -> None:
    """Trains into `out` in a process, and prints its lines. Cancelling this ends all processes of the training.

    inputs: those of train.py. replaced: texts to replace in the printed lines, such as paths that mean nothing to a
    client. RuntimeError with the reason and the last lines if the training fails.
    """
    set_compile_cache_folders()
    with tempfile.TemporaryDirectory(dir=out.parent, ignore_cleanup_errors=True) as temporary:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "clip_gen", *train_words(inputs, out), "--watch-stdin"),
            limit=MAX_LINE,
            stdin=asyncio.subprocess.PIPE,  # closes when this process ends
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**TRAIN_ENVIRONMENT, **os.environ, "TMPDIR": temporary},  # a killed training leaves files there
        )
        last_lines: deque[str] = deque(maxlen=ERROR_LINES)
        try:
            async for encoded in process.stdout:
                line = encoded.decode(errors="replace").rstrip()
                for text, replacement in replaced.items():
                    line = line.replace(text, replacement)
                print(line, flush=True)
                last_lines.append(line[:ERROR_CHARACTERS])
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()  # closes its pipes here, not in a later garbage collection
    if code:
        raise RuntimeError(failure(code, last_lines))


def failure(code: int, lines: Sequence[str]) -> str:
    """Why a training failed: its last `train: ...` line, and its last lines, which Cog's reply leaves out."""
    ended = f"with exit status {code}" if code > 0 else f"by {signal.Signals(-code).name}, perhaps for lack of memory"
    reasons = [line.removeprefix("train: ") for line in lines if line.startswith("train: ")]
    reason = reasons[-1] if reasons else f"the training ended {ended}"
    text = "\n".join([reason, "", "The last lines of the log:", *lines])
    # Cog takes an error that contains "cancelled" for a cancelled training.
    return text.replace("cancelled", "canceled")


@contextmanager
def one_training(scratch: Path) -> Iterator[tuple[Path, Path]]:
    """A temporary folder for the training, removed at the end, and the folder in which to keep the weights.

    The second is the project's folder, which `cog train` shares with its host, or one in `scratch` if that cannot be
    written to. ValueError while another training uses the second folder.
    """
    kept = ROOT
    if not is_writable(ROOT):
        kept = scratch / "kept"
        print(f"{ROOT} cannot be written to: the weights go to {kept}, which the server removes when it ends")
    with folder_lock(kept / ".cog" / "training", BUSY):
        scratch.mkdir(exist_ok=True)  # it may have been cleaned up
        with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
            yield Path(folder), kept


def keep(out: Path, kept: Path, scratch: Path) -> Path:
    """Copies the weights and the report of a training to the folder `kept`. Returns the path of the weights.

    They go to a folder in `scratch` if that fails, as on a full disk.
    """
    try:
        for made, name in KEPT.items():
            with atomic_file(kept / name) as temporary:
                shutil.copyfile(out / made, temporary)
    except OSError as error:
        elsewhere = scratch / "kept"
        if kept == elsewhere:
            raise
        print(f"{kept} can no longer be written to ({error.strerror}): the weights go to {elsewhere}")
        elsewhere.mkdir(exist_ok=True)
        return keep(out, elsewhere, scratch)
    print(f"kept: {' and '.join(str(kept / name) for name in KEPT.values())}")
    return kept / KEPT["weights.tar"]


def sent_name(images: Path) -> str:
    """The client's name of the pictures, for messages: Cog names a downloaded file after its URL."""
    name = RANDOM.sub("", images.name)
    uploaded = not name or name.partition(".")[0] == "file"  # Cog's name for a data URL
    return "images (the uploaded file)" if uploaded else f"images ({shown(name)})"
