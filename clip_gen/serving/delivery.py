"""A training in Cog's server: one at a time, in temporary folders, and its files kept where they can be written."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_gen.data.manifest import shown
from clip_gen.files import ROOT, atomic_file, folder_lock, is_writable

KEPT = {"weights.tar": "trained_model.tar", "report.html": "trained_model.html"}
BUSY = "this server trains one model at a time, and a training is under way; try again when it has ended"
RANDOM = re.compile(r"^tmp.{8}")  # what Cog puts before the name of a file that it fetched


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="clip-gen-train-", ignore_cleanup_errors=True)


def scratch_folder() -> Path:
    """This process's temporary folder for trainings, which ends with the process."""
    folder = Path(_scratch().name)
    folder.mkdir(exist_ok=True)  # a cleaner of the temporary folder may have removed it
    return folder


@functools.cache
def end_with_server() -> None:
    """Ends this process, a worker of Cog's, soon after its server. By itself it would end after the training."""
    server = os.getppid()

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-server", daemon=True).start()


@contextmanager
def one_training() -> Iterator[tuple[Path, Path]]:
    """A temporary folder for the training, removed at the end, and the folder to keep the weights in.

    The latter is the project's folder, which `cog train` shares with its host; where that cannot be written to, a
    temporary one. ValueError while another training runs that would keep its weights there.
    """
    kept = ROOT
    if not is_writable(ROOT):
        kept = scratch_folder() / "kept"
        print(f"{ROOT} cannot be written to: the weights go to {kept}, which the server removes when it ends")
    with (
        folder_lock(kept / ".cog" / "training", BUSY),
        tempfile.TemporaryDirectory(dir=scratch_folder(), ignore_cleanup_errors=True) as folder,
    ):
        yield Path(folder), kept


def keep(folder: Path, kept: Path) -> Path:
    """Copies the weights and the report out of the training's folder; returns where the weights are."""
    try:
        for made, name in KEPT.items():
            with atomic_file(kept / name) as temporary:
                shutil.copyfile(folder / made, temporary)
    except OSError as error:
        elsewhere = scratch_folder() / "kept"
        if kept == elsewhere:
            raise
        print(f"{kept} cannot be written to any more ({error.strerror}): the weights go to {elsewhere}")
        elsewhere.mkdir(exist_ok=True)
        return keep(folder, elsewhere)
    print(f"kept: {' and '.join(str(kept / name) for name in KEPT.values())}")
    return kept / KEPT["weights.tar"]


def sent_name(images: Path) -> str:
    """What the client knows the pictures by, for messages: Cog names the file that it fetched after the URL."""
    name = RANDOM.sub("", images.name)
    uploaded = not name or name.partition(".")[0] == "file"  # what Cog calls a data URL
    return "images (the uploaded file)" if uploaded else f"images ({shown(name)})"


def move_images(images: Path, folder: Path) -> str:
    """Moves the file that Cog fetched, so that it is removed with the folder even if Cog's worker is killed.

    Returns its path, which has no characters that a client chose.
    """
    suffixes = re.findall(r"\.[A-Za-z0-9]{1,8}", images.name)[-2:]
    return str(shutil.move(images, folder / f"images{''.join(suffixes)}"))
