"""The cache of unpacked weights: its place, locks on folders in use, and removal of the oldest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from clip_gen.data.limits import reason_of
from clip_gen.files import open_descriptor
from clip_gen.weights.model_folder import ModelFolderError

UNPACKING = ".unpacking-"
MAX_GB = 20.0  # default of CLIP_GEN_CACHE_GB
FREE_GB = 2.0  # default of CLIP_GEN_CACHE_FREE_GB


class CacheError(ModelFolderError):
    """The cache cannot be used or is full."""


class WeightsFolder:
    """A model folder on disk. No process removes a folder in the cache while such an object holds its lock.

    close(), garbage collection and the end of the process release the lock.
    """

    def __init__(self, path: Path, cached: bool = False):
        self.path = path
        self.close: Callable[[], None] = lambda: None
        if cached:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            self.close = weakref.finalize(self, os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_SH)


class Cache:
    """Unpacked weights by key, in the folder of _cache_folder. Safe from several threads and processes.

    To stay within max_bytes for all folders together, and to keep free_bytes of the disk free, the folders that were
    used least recently are removed.
    """

    def __init__(self) -> None:
        self.folder = _cache_folder()
        self.max_bytes = _gigabytes("CLIP_GEN_CACHE_GB", MAX_GB)
        self.free_bytes = _gigabytes("CLIP_GEN_CACHE_FREE_GB", FREE_GB)

    def find(self, key: str) -> WeightsFolder | None:
        """The unpacked folder for this key, if the cache has it."""
        path = self._path(key)
        with self._locked():
            if not path.is_dir():
                return None
            os.utime(path)
            return WeightsFolder(path, cached=True)

    def add(self, key: str, unpack: Callable[[Path], None]) -> WeightsFolder:
        """Adds a folder that unpack() fills; removes it if unpack() fails."""
        with self._locked():
            new = WeightsFolder(Path(tempfile.mkdtemp(dir=self.folder, prefix=UNPACKING)), cached=True)
        try:
            unpack(new.path)
            with self._locked():
                path = self._path(key)
                if not path.is_dir():  # else another process was faster
                    os.replace(new.path, path)
                    os.utime(path)
                return WeightsFolder(path, cached=True)
        finally:
            shutil.rmtree(new.path, ignore_errors=True)
            new.close()

    def make_room(self, wanted: int) -> bool:
        """Removes unused folders until `wanted` more bytes fit; returns whether they do.

        Also removes incomplete folders of killed processes.
        """
        with self._locked():
            for path in self.folder.glob(f"{UNPACKING}*"):
                self._remove_unused(path)
            folders = (path for path in self.folder.iterdir() if path.name[0] != ".")
            oldest_first = sorted(folders, key=lambda path: path.stat().st_mtime)
            while not self._fits(wanted):
                if not oldest_first:
                    return False
                self._remove_unused(oldest_first.pop(0))
        return True

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:32]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of the cache, so that no other thread or process finds, adds or removes folders."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fits(self, wanted: int) -> bool:
        free = shutil.disk_usage(self.folder).free
        return self._bytes() + wanted <= self.max_bytes and free - wanted >= self.free_bytes

    def _bytes(self) -> int:
        total = 0
        for folder, _, names in os.walk(self.folder):  # ignores folders that disappear meanwhile
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def _remove_unused(self, path: Path) -> None:
        with contextlib.suppress(OSError), open_descriptor(path) as lock:  # gone, in use, or another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Rename first, so that nobody uses a half-removed folder.
            aside = path.with_name(f"{UNPACKING}removed-{path.name.removeprefix(UNPACKING)}")
            os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)


def _gigabytes(name: str, default: float) -> float:
    """An environment variable in GB, converted to bytes; CacheError unless it is a number of 0 or more."""
    text = os.environ.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text) * 1e9
    raise CacheError(f"{name} is {text[:100]}; give a number of gigabytes, 0 or more")


def _cache_folder() -> Path:
    """weights/ in $CLIP_GEN_CACHE. Without it in ~/.cache/clip-gen, or where that cannot be written to, in a private
    folder in the temporary folder: a container's user may have no home. CacheError if none can be written to.
    """
    named = os.environ.get("CLIP_GEN_CACHE")
    folder = Path(named or "~/.cache/clip-gen")
    try:
        return _writable(folder.expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        if not named:
            folder = Path(tempfile.gettempdir(), f"clip-gen-{os.getuid()}")
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, exist_ok=True)
                status = folder.lstat()
                if status.st_uid == os.getuid() and status.st_mode == stat.S_IFDIR | 0o700:
                    return _writable(folder)
        raise CacheError(
            f"{folder}: cannot be used for the weights cache ({reason_of(error)}); set CLIP_GEN_CACHE to a folder"
        ) from error


def _writable(folder: Path) -> Path:
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=weights).close()
    return weights
