"""Running `python -m clip_gen train` for Cog: inputs as options, its lines as they come, and no process left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from clip_gen.files import COMMAND, ROOT
from clip_gen.serving.cli import named, parse_inputs, parse_options
from clip_gen.serving.inputs import InputError, checked
from clip_gen.serving.schema import project_signatures
from clip_gen.weights.url import is_url

TRAINS = (
    "script/train",
    "Trains on a zip, a tar or a folder of pictures without captions and leaves trained/weights.tar, for "
    "script/predict -e COG_WEIGHTS=trained/weights.tar.",
    "script/train -i images=@photos.zip",
    "folder for the weights, `trained` by default; the same command started again resumes the training",
)
# glibc's malloc keeps what a step has freed for the next: the system clears every page it gives anew, and on a CPU that
# can take as long as the arithmetic.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # by a person, a system or a closed terminal
SPIN = {"GOMP_SPINCOUNT": "100000"}  # idle OpenMP threads wait awake for a tenth of a millisecond: steps are short
KEPT_LINES = 20  # of what was printed last, for the error
LONGEST_LINE = 2**20  # bytes; a longer one is cut in two
LONGEST_ERROR = 20_000  # characters


class TrainingFailed(RuntimeError):
    """A training ended without weights; the message is the last that it said.

    status: as shells have it. log: the lines before.
    """

    def __init__(self, code: int, lines: Iterable[str]):
        self.status = code if code >= 0 else 128 - code
        said = [line for line in lines if line.startswith("train: ")][-1:]
        self.log = [line for line in lines if line not in said]
        unsaid = f"the training ended with exit status {self.status}; see above"
        super().__init__(said[0].removeprefix("train: ") if said else "\n".join(self.log) or unsaid)

    def with_log(self) -> str:
        """The message and the lines before: Cog answers a failed request without its logs."""
        text = str(self)
        if self.log and self.log != text.split("\n"):
            text = "\n".join([text, "", "The last lines of the log:", *self.log])
        # Cog takes an error with this word in it for a cancelled training.
        return text[:LONGEST_ERROR].replace("cancelled", "canceled")


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


async def run_training(
    values: dict[str, object], out: Path, command: str = "", shown: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Trains into `out` and prints what the training says. Cancelled, it ends at once with all its processes.

    command: what a person typed in a shell to start it. What it says then goes to the standard error of this process,
    and signals that would end this process go to the training, which saves a checkpoint first.
    shown: text to print in place of other text, as of paths that mean nothing to a client.
    """
    cache, folder = tempfile.gettempdir(), tempfile.gettempdir() if command else str(out.parent)
    # A training that is killed leaves sockets there. Their paths may have 107 characters.
    temporary = tempfile.mkdtemp(prefix="training-", dir=folder if len(folder) < 50 else "/tmp")
    defaults = KEEP_MEMORY | SPIN | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/torchinductor_{os.getuid()}"}
    more = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TMPDIR": temporary, COMMAND: command}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "clip_gen", "train", *options(values, out)),
        *("--watch-stdin", "save" if command else "end"),  # nobody resumes what a client began
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,  # closes when this process is gone
        stdout=asyncio.subprocess.PIPE,
        stderr=None if command else asyncio.subprocess.STDOUT,
        start_new_session=True,
        env={**defaults, **os.environ, **more},
    )
    last: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        if command:
            _pass_on_signals(process)
        async for line in lines_of(process.stdout):
            for text, instead in shown.items():
                line = line.replace(text, instead)
            print(line, flush=True)
            last.append(line)
        code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()  # or its pipes are closed by whoever clears up memory next, in the middle of anything
        shutil.rmtree(temporary, ignore_errors=True)
    if code:
        raise TrainingFailed(code, last)


def _pass_on_signals(process: asyncio.subprocess.Process) -> None:
    """Signals that would end this process go to the training instead, except those that are ignored, as by nohup."""

    def pass_on(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, pass_on, number)


async def lines_of(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Its lines, of any length: asyncio's own iteration raises ValueError for one over 64 KiB."""
    rest = b""
    while chunk := await stream.read(2**16):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            yield line.decode(errors="replace").rstrip()
    if rest:
        yield rest.decode(errors="replace").rstrip()


def from_here(weights: str | None) -> str | None:
    """A path made absolute; a URL, or nothing, as it is."""
    return weights if not weights or is_url(weights) else str(Path(os.path.expanduser(weights)).absolute())


def main(arguments: Sequence[str]) -> int:
    """What `cog train` does, in a folder that outlives it. 1 and a sentence on stderr when it cannot be done."""
    try:
        fields = project_signatures()[1].inputs
        given = parse_options(arguments, fields, TRAINS)
        os.environ.update(named(given.env, "-e"))
        texts = named(given.input, "-i")
        if is_url(texts.get("images", "").removeprefix("@")):
            raise InputError(f"images is {texts['images']}; download it first, and give the file or folder")
        values = checked(parse_inputs(texts, fields), fields)
        images, out = Path(values["images"]).absolute(), Path(given.output or "trained").absolute()
        if not images.exists():
            raise InputError(f"images is {images}: no such file; give a zip, a tar or a folder of pictures")
        # Said from where the caller stands; the training runs in the project's folder.
        values["base"] = from_here(values["base"])
        if os.environ.get("COG_WEIGHTS"):
            os.environ["COG_WEIGHTS"] = from_here(os.environ["COG_WEIGHTS"])
        command = shlex.join(["script/train", *arguments])
        asyncio.run(run_training(values | {"images": images}, out, command))
        print(out / "weights.tar")
    except TrainingFailed as error:
        # The training itself has said anything else.
        if error.status > 128 and error.status - 128 not in ENDING:
            print(f"{error}; the same command resumes from the last checkpoint", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
