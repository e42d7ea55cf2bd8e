"""Files and folders that are written completely or not at all, and the folders that a command may write into."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the project's folder; site-packages after `pip install`
# How messages write this project's commands, so that they can be pasted.
MODULE = f"{'.venv/bin/' if Path(sys.prefix).resolve() == (ROOT / '.venv').resolve() else ''}python -m clip_gen"
COMMAND = "CLIP_GEN_COMMAND"  # the environment variable with the command that started a training, for messages
PARTIAL = ".clip-gen-saving-"  # prefix of incomplete files and folders; leftovers with it are removed
LEFTOVER_SECONDS = 60  # a newer file may not be locked yet
MARK = ".clip-gen"  # the file that marks a folder as written by this program
# Made by the operating system. They do not count as content and are never removed.
SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"}


def checkpoints_folder() -> Path:
    """Where model folders are kept: the project's checkpoints/, or the user's data folder after `pip install`."""
    if (ROOT / "checkpoints").is_dir():
        return ROOT / "checkpoints"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "clip-gen" / "checkpoints"


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[str]:
    """The path of a temporary file to write. It replaces `path` on success and is removed on failure.

    durable: sync the data to disk before `path` changes, so that a power failure cannot lose both versions.
    """
    with _temporary_folder(path.parent) as folder:
        new = str(folder / "new")
        yield new
        if durable:
            sync(new)
        os.replace(new, path)
        if durable:
            sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`. It replaces `path` on success; on failure `path` stays as it was."""
    path = Path(os.path.realpath(path))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(path.parent) as folder:
        new, old = folder / "new", folder / "old"
        new.mkdir()
        old.mkdir()
        yield new
        for file in (*new.rglob("*"), new):
            sync(file)
        if path.exists():
            os.replace(path, old / path.name)
        os.replace(new, path)
        sync(path.parent)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A locked folder in `parent`, which is removed at the end. Leftovers of killed processes are removed first."""
    remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=PARTIAL))
    try:
        with open_descriptor(folder) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        _put_back(folder)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, seconds: float = LEFTOVER_SECONDS) -> None:
    """Removes unlocked leftovers of atomic_file and atomic_folder that are older than this."""
    for path in parent.glob(f"{PARTIAL}*"):
        with suppress(OSError), open_descriptor(path) as lock:  # locked, or another user's
            if time.time() - os.fstat(lock).st_mtime < seconds:
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                _put_back(path)
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def open_descriptor(path: str | Path) -> Iterator[int]:
    """File descriptor of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _put_back(temporary: Path) -> None:
    """Restores the old folder if atomic_folder was interrupted between its two renames."""
    for old in temporary.glob("old/*"):
        if not (temporary.parent / old.name).exists():
            os.replace(old, temporary.parent / old.name)


def write_text_atomic(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def sync(path: str | Path) -> None:
    """fsync of a file, or of a folder's list of names."""
    with open_descriptor(path) as descriptor:
        os.fsync(descriptor)


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins with these bytes is HTML or XML. No archive and no weights begin with a "<"."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


def disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def set_compile_cache_folders() -> None:
    """Sets the cache folders of torch's compiler, Triton and Matplotlib, unless they are set. Call it before torch is
    imported.

    Torch's default contains the user's name, and the others' are in the home folder. A container's user may have
    neither.
    """
    folder = Path(tempfile.gettempdir())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / f"torchinductor-{os.getuid()}"))
    if not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / f"triton-{os.getuid()}"))
        os.environ.setdefault("MPLCONFIGDIR", str(folder / f"matplotlib-{os.getuid()}"))


def is_writable(folder: Path) -> bool:
    try:
        check_writable(folder)
    except ValueError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def folder_lock(folder: Path, message: str) -> Iterator[None]:
    """Holds the lock of a folder. ValueError with the message and the other process's id if it is held already."""
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+")  # "w" would erase the holder's process id
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            raise ValueError(message + (f" (process {holder} holds it)" if holder else "")) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextmanager
def errors_named(folder: Path) -> Iterator[None]:
    """Turns an OSError into a ValueError that names the folder and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{folder}: cannot be used ({error.strerror}); name another folder") from error


def check_writable(folder: Path) -> None:
    """ValueError unless this process can write into the folder, or create it. Leaves nothing there.

    Makes a folder there and removes it, because permissions say nothing about root.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    with errors_named(folder):
        os.rmdir(tempfile.mkdtemp(dir=nearest, prefix=PARTIAL))


def check_claimable(folder: Path, kind: str, made_here: bool = False, expected: Collection[str] = (MARK,)) -> None:
    """ValueError unless the folder is new, empty or made by this program. Changes no file.

    kind: the kind of folder in the mark, such as "training". made_here: whether a folder without a mark is of this
    program. expected: names that the message does not complain about.
    """
    check_writable(folder)
    names, mark = list_names(folder), folder / MARK
    if mark.is_file():
        made_here = mark.read_text(errors="replace").startswith(f"{kind}\n")
    if names and not made_here:
        shown = next((name for name in names if name not in expected), names[0])
        raise ValueError(f"{folder} holds {shown} and is no {kind} folder of this program; name a new or an empty one")


def check_replaceable(folder: Path, kind: str, names: Collection[str], made_here: bool) -> None:
    """ValueError unless the folder is new or empty, or was made here and holds only files of these names."""
    check_claimable(folder, kind, made_here and set(list_names(folder)) <= set(names), names)
    check_writable(folder.absolute().parent)  # where atomic_folder writes first


def claim_folder(folder: Path, kind: str, made_here: bool = False) -> None:
    """Creates the folder and marks it as made by this program. Raises what check_claimable raises."""
    check_claimable(folder, kind, made_here)
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARK).is_file():
            text = f"{kind}\nCLIP-GEN made this folder and replaces files in it. Keep your own files elsewhere.\n"
            write_text_atomic(folder / MARK, text)


def list_names(folder: Path) -> list[str]:
    """Sorted names in the folder, without SYSTEM_FILES and incomplete files; none if there is no such folder."""
    with errors_named(folder):
        names = os.listdir(folder) if folder.exists() else []
    return sorted(name for name in names if name not in SYSTEM_FILES and not name.startswith(PARTIAL))


def shortened(text: str) -> str:
    """A path, a URL or a reason for messages. Of a long path both ends are kept: its file name is at its end."""
    if text.startswith("/"):
        return text if len(text) <= 200 else f"{text[:97]}...{text[-100:]}"
    return text if len(text) <= 100 else text[:97] + "..."
