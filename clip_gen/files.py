"""Files and folders written whole or not at all; what tells a file from others."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the project's folder
SAVING = ".saving-"  # how the names of files that are not whole yet begin
LEFT_OVER_SECONDS = 60  # a new file may not have its lock yet


@contextmanager
def whole_or_not(path: Path) -> Iterator[str]:
    """A temporary name beside `path` that takes its place when all went well, and is gone when not.

    What a process that was killed left of this is removed the next time.
    """
    remove_left_over(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=SAVING)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner's eyes only
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(handle)


def remove_left_over(folder: Path) -> None:
    """Removes files of whole_or_not that no process writes: nobody holds their lock."""
    for path in folder.glob(f"{SAVING}*"):
        with suppress(OSError), path.open("rb") as file:  # OSError: in use, a folder, or another user's
            if time.time() - os.fstat(file.fileno()).st_mtime > LEFT_OVER_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def write_whole(path: Path, text: str) -> None:
    with whole_or_not(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins with these bytes is HTML or XML. No archive and no weights begin with a "<"."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


def name_cache_folders() -> None:
    """Names the folders for compiled code, where nobody has. To be called before torch is imported.

    Torch's default has the name of the user in it, and Triton's is in the home folder: a user of a container may have
    neither.
    """
    folder = Path(tempfile.gettempdir())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / f"torchinductor-{os.getuid()}"))
    if not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / f"triton-{os.getuid()}"))


def is_writable(folder: Path) -> bool:
    """Whether a folder can be made in this one. Tried, since permissions alone do not tell: root has them all."""
    try:
        os.rmdir(tempfile.mkdtemp(dir=folder, prefix=SAVING))
    except OSError:
        return False
    return True


def digest_of(path: Path) -> str:
    """Its SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def alone_in(folder: Path, otherwise: str) -> Iterator[None]:
    """No other process that asks for this works in the folder meanwhile; ValueError(otherwise) when one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(otherwise) from None
        yield


@contextmanager
def whole_folder_or_not(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when all went well, and is gone when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=SAVING))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are for their owner's eyes only
        if path.exists():
            os.replace(path, temporary.with_suffix(".old"))
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_suffix(".old"), ignore_errors=True)
