"""Trainings of Cog's server: one at a time, in temporary folders, with their weights kept in a folder."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_gen.data.manifest import shown
from clip_gen.files import ROOT, atomic_file, folder_lock, is_writable

KEPT = {"weights.tar": "trained_model.tar", "report.html": "trained_model.html"}
BUSY = "this server trains one model at a time, and a training is under way; try again when it has ended"
RANDOM = re.compile(r"^tmp.{8}")  # Cog's prefix of a downloaded file's name


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="clip-gen-train-", ignore_cleanup_errors=True)


def scratch_folder() -> Path:
    """This process's temporary folder for trainings, removed with the process."""
    folder = Path(_scratch().name)
    folder.mkdir(exist_ok=True)  # it may have been cleaned up
    return folder


@contextmanager
def one_training() -> Iterator[tuple[Path, Path]]:
    """A temporary folder for the training, removed at the end, and the folder in which to keep the weights.

    The second is the project's folder, which `cog train` shares with its host, or a temporary one if the project's
    folder cannot be written to. ValueError while another training uses the second folder.
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
    """Copies the weights and the report from the training's folder. Returns the path of the weights."""
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
    """The client's name of the pictures, for messages: Cog names a downloaded file after its URL."""
    name = RANDOM.sub("", images.name)
    uploaded = not name or name.partition(".")[0] == "file"  # Cog's name for a data URL
    return "images (the uploaded file)" if uploaded else f"images ({shown(name)})"


def move_images(images: Path, folder: Path) -> str:
    """Moves the file that Cog fetched, so that it is removed with the folder even if Cog's worker is killed.

    Returns its path, which has no characters that a client chose.
    """
    suffixes = re.findall(r"\.[A-Za-z0-9]{1,8}", images.name)[-2:]
    return str(shutil.move(images, folder / f"images{''.join(suffixes)}"))
