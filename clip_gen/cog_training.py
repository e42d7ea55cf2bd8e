"""Running `python -m clip_gen train` for Cog: inputs as options, its lines as they come, and no process left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_gen.cog_cli import named, parse_inputs, parse_options
from clip_gen.cog_inputs import InputError, checked
from clip_gen.cog_schema import project_signatures
from clip_gen.download import URLS
from clip_gen.files import ROOT, whole_or_not

DELIVERED = {"weights.tar": "trained_model.tar", "report.html": "trained_model.html"}
TRAINS = (
    "script/train",
    "Trains on a zip, a tar or a folder of pictures without captions and leaves trained/weights.tar, for "
    "script/predict -e COG_WEIGHTS=trained/weights.tar.",
    "script/train -i images=@photos.zip",
    "folder for the weights, `trained` by default; the same command started again goes on where it was cut off",
)
# glibc's malloc keeps what a step has freed for the next: the system clears every page it gives anew, and on a CPU that
# can take as long as the arithmetic.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
KEPT_LINES = 20  # of what was printed last, for the error


class TrainingFailed(RuntimeError):
    """A training ended without weights; the message is the last that it said."""


def options(values: dict[str, object], out: Path) -> list[str]:
    """The inputs of train.py as the command's arguments."""
    words = [str(values["images"]), "--out", str(out)]
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif name != "images" and value is not None:
            words.append(f"{option}={value}")
    return words


async def run_training(values: dict[str, object], out: Path, terminal: bool = False) -> None:
    """Trains into `out` and prints what the training says. Cancelled, it ends at once with all its processes.

    terminal: what it says goes to the terminal this runs in, where it keeps its progress on one line.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "clip_gen", "train", *options(values, out)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=None if terminal else asyncio.subprocess.STDOUT,
        start_new_session=True,
        env={**KEEP_MEMORY, **os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    last: list[str] = []
    try:
        async for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            print(text, flush=True)
            last = [*last, text][-KEPT_LINES:]
        code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()  # or its pipes are closed by whoever clears up memory next, in the middle of anything
    if code:
        said = [line for line in last if line.startswith("train: ")]
        unsaid = f"the training ended with exit status {code}; see above"
        raise TrainingFailed(said[-1].removeprefix("train: ") if said else "\n".join(last) or unsaid)


def deliver(out: Path) -> Path:
    """Copies the weights and the report out of the training's folder, into the project's folder, which `cog train`
    shares with its host; returns where the weights are.
    """
    for made, name in DELIVERED.items():
        with whole_or_not(ROOT / name) as temporary:
            shutil.copyfile(out / made, temporary)
    print(f"kept: {' and '.join(str(ROOT / name) for name in DELIVERED.values())}")
    return ROOT / DELIVERED["weights.tar"]


def from_here(weights: str | None) -> str | None:
    """A path made absolute; a URL, or nothing, as it is."""
    return weights if not weights or weights.startswith(URLS) else str(Path(os.path.expanduser(weights)).absolute())


def _end_as_by_ctrl_c() -> None:
    """A terminal that closes, or somebody who ends this process, ends the training too, unless told to be ignored."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)


def main(arguments: Sequence[str]) -> int:
    """What `cog train` does, in a folder that outlives it. 1 and a sentence on stderr when it cannot be done."""
    out = None
    try:
        fields = project_signatures()[1].inputs
        given = parse_options(arguments, fields, TRAINS)
        os.environ.update(named(given.env, "-e"))
        texts = named(given.input, "-i")
        if texts.get("images", "").removeprefix("@").startswith(URLS):
            raise InputError(f"images is {texts['images']}; download it first, and give the file or folder")
        values = checked(parse_inputs(texts, fields), fields)
        images, out = Path(values["images"]).absolute(), Path(given.output or "trained").absolute()
        if not images.exists():
            raise InputError(f"images is {images}: no such file; give a zip, a tar or a folder of pictures")
        # Said from where the caller stands; the training runs in the project's folder.
        values["base"] = from_here(values["base"])
        if os.environ.get("COG_WEIGHTS"):
            os.environ["COG_WEIGHTS"] = from_here(os.environ["COG_WEIGHTS"])
        _end_as_by_ctrl_c()
        asyncio.run(run_training(values | {"images": images}, out, terminal=sys.stderr.isatty()))
        print(out / "weights.tar")
    except KeyboardInterrupt:
        if out:
            print(f"cut off; the same command goes on from {out}", file=sys.stderr)
        return 130
    except TrainingFailed as error:
        if not sys.stderr.isatty():  # where the training said it itself
            print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
