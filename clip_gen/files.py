"""Files and folders that are written completely or not at all, and the folders that a command may write into."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the project's folder; site-packages after `pip install`
COMMAND = "CLIP_GEN_COMMAND"  # the variable that holds what a person typed to start a training, for messages
SAVING = ".saving-"  # how the names of incomplete files and folders begin
LEFT_OVER_SECONDS = 60  # a new file may not have its lock yet
MARK = ".clip-gen"  # the file that marks a folder as written by this program
# Left by the system, not by a person; nothing here writes or removes them.
SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"}


def checkpoints_folder() -> Path:
    """Where model folders are kept: the project's checkpoints/, or the user's data folder after `pip install`."""
    if (ROOT / "checkpoints").is_dir():
        return ROOT / "checkpoints"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "clip-gen" / "checkpoints"


@contextmanager
def whole_or_not(path: Path, durable: bool = True) -> Iterator[str]:
    """A temporary name beside `path`. It replaces `path` on success and is removed on failure.

    What a killed process left of this is removed the next time. durable: the data has reached the disk before `path`
    changes, so that a power failure cannot lose both versions.
    """
    remove_left_over(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=SAVING)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp's files are readable by their owner only
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    if durable:
        sync(path.parent)


def remove_left_over(folder: Path, seconds: float = LEFT_OVER_SECONDS) -> None:
    """Removes what whole_or_not and whole_folder_or_not began so long ago and nobody holds the lock of.

    Between the two renames of whole_folder_or_not the old folder is there alone: it gets its name back.
    """
    for path in folder.glob(f"{SAVING}*"):
        with suppress(OSError), _opened(path) as descriptor:  # OSError: in use, or another user's
            if time.time() - os.fstat(descriptor).st_mtime < seconds:
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                _put_back(path)
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    """A descriptor of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _put_back(temporary: Path) -> None:
    """Undoes the first half of a replacement that was interrupted before the second."""
    for old in temporary.glob("old/*"):
        if not (temporary.parent / old.name).exists():
            os.replace(old, temporary.parent / old.name)


def write_whole(path: Path, text: str, durable: bool = True) -> None:
    with whole_or_not(path, durable) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def sync(path: str | Path) -> None:
    """Returns when the file's data, or the folder's list of names, is on the disk."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


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
    """Holds the folder's lock, which at most one process can. ValueError(otherwise, and by which process) if taken."""
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+")  # not "w": that would erase the holder's number
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            raise ValueError(otherwise + (f" (process {holder} holds it)" if holder else "")) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextmanager
def whole_folder_or_not(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`. It replaces `path` on success; on any failure `path` is as it was before."""
    path = Path(os.path.realpath(path))  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(path.parent)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=SAVING))
    new, old = temporary / "new", temporary / "old"
    try:
        with _opened(temporary) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.mkdir()
            old.mkdir()
            yield new
            for file in new.rglob("*"):
                sync(file)
            sync(new)
            if path.exists():
                os.replace(path, old / path.name)
            os.replace(new, path)
            sync(path.parent)
    finally:
        _put_back(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def errors_named(folder: Path) -> Iterator[None]:
    """Turns an OSError into a ValueError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{folder}: cannot be used ({error.strerror}); name another folder") from error


def check_writable(folder: Path) -> None:
    """ValueError when this cannot be a folder that this process writes into. Leaves nothing there."""
    with errors_named(folder):
        nearest = folder.absolute()
        while not nearest.exists():
            if nearest.is_symlink():
                raise ValueError(
                    f"{nearest} is a link to {os.readlink(nearest)}, which does not exist; name another folder"
                )
            nearest = nearest.parent
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a new or an empty folder")
        if not nearest.is_dir():
            raise ValueError(f"{folder}: {nearest} is a file, so it cannot contain a folder; name another folder")
        if not is_writable(nearest):
            raise ValueError(f"{folder}: {nearest} cannot be written to; name another folder or change its permissions")


def check_own(folder: Path, kind: str, made_before_marks: Callable[[Path], bool]) -> None:
    """ValueError unless the folder is new, empty or one that this program made. Changes no file.

    kind: what the mark must say, such as "training". made_before_marks: whether a version of this program that wrote
    no marks made the folder.
    """
    check_writable(folder)
    names = names_in(folder)
    mark = folder / MARK
    if not names or (mark.is_file() and mark.read_text(errors="replace").startswith(f"{kind}\n")):
        return
    if mark.is_file() or not made_before_marks(folder):
        shown = next((name for name in names if name != MARK), MARK)
        raise ValueError(f"{folder} holds {shown} and is no {kind} folder of this program; name a new or an empty one")


def check_replaceable(folder: Path, kind: str, names: Collection[str], made_here: Callable[[Path], bool]) -> None:
    """ValueError unless the folder is new, empty, or holds only files of these names and made_here accepts it.

    kind: what such a folder is called in the error.
    """
    check_writable(folder)
    check_writable(folder.absolute().parent)  # where the new one is written first
    found = names_in(folder)
    strange = [name for name in found if name not in names]
    if strange:
        raise ValueError(f"{folder}: holds {strange[0]}, which is no part of a {kind}; give another folder")
    if found and not made_here(folder):
        raise ValueError(f"{folder}: holds {found[0]}, but is no {kind} of this program; give another folder")


def own(folder: Path, kind: str, made_before_marks: Callable[[Path], bool]) -> None:
    """Creates and marks the folder, so that check_own accepts it from now on; ValueError where check_own says so."""
    check_own(folder, kind, made_before_marks)
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARK).is_file():
            text = f"{kind}\nCLIP-GEN made this folder and replaces files in it. Keep your own files elsewhere.\n"
            write_whole(folder / MARK, text)


def names_in(folder: Path) -> list[str]:
    """Sorted names of what is in the folder, without the system's files and those that are being written."""
    with errors_named(folder):
        names = os.listdir(folder) if folder.exists() else []
    return sorted(name for name in names if name not in SYSTEM_FILES and not name.startswith(SAVING))
