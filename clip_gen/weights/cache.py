"""The cache of unpacked weights: where it is, which folders are in use, and which are removed to make room."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from clip_gen.weights.model_folder import ModelFolderError

UNPACKING = ".unpacking-"
MAX_GB = 20.0  # the default of CLIP_GEN_CACHE_GB
FREE_GB = 2.0  # the default of CLIP_GEN_CACHE_FREE_GB


class CacheError(ModelFolderError):
    """The cache cannot be used, or has no room for more weights now."""


class WeightsFolder:
    """A model folder on disk. One in the cache is not removed by any process while this object is in use.

    The lock ends with close(), when the object is garbage-collected, or with the process.
    """

    def __init__(self, path: Path, cached: bool = False):
        self.path = path
        self.close: Callable[[], None] = lambda: None
        if cached:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            self.close = weakref.finalize(self, os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_SH)


class Cache:
    """Unpacked weights by key, in $CLIP_GEN_CACHE or ~/.cache/clip-gen. Safe from several threads and processes.

    max_bytes: of all folders together. free_bytes: of the disk that stay free. Both come from the environment if not
    given, and hold as far as folders can be removed, the ones used longest ago first.
    """

    def __init__(self, max_bytes: float | None = None, free_bytes: float | None = None):
        self.folder = _cache_folder()
        self.max_bytes = _gigabytes("CLIP_GEN_CACHE_GB", MAX_GB) if max_bytes is None else max_bytes
        self.free_bytes = _gigabytes("CLIP_GEN_CACHE_FREE_GB", FREE_GB) if free_bytes is None else free_bytes

    def find(self, key: str) -> WeightsFolder | None:
        """The folder that was unpacked for this key earlier."""
        path = self._path(key)
        with self._alone():
            if not path.is_dir():
                return None
            os.utime(path)
            return WeightsFolder(path, cached=True)

    def add(self, key: str, unpack: Callable[[Path], None]) -> WeightsFolder:
        """A new folder, which unpack() fills; nothing is left of it if unpack() fails."""
        with self._alone():
            new = WeightsFolder(Path(tempfile.mkdtemp(dir=self.folder, prefix=UNPACKING)), cached=True)
        try:
            unpack(new.path)
            with self._alone():
                path = self._path(key)
                if not path.is_dir():  # otherwise another process was faster
                    os.replace(new.path, path)
                    os.utime(path)
                return WeightsFolder(path, cached=True)
        finally:
            shutil.rmtree(new.path, ignore_errors=True)
            new.close()

    def make_room(self, wanted: int) -> bool:
        """Removes folders that nobody uses until so many more bytes fit; whether they do.

        Half-unpacked folders of processes that were killed are removed at once.
        """
        with self._alone():
            for path in self.folder.glob(f"{UNPACKING}*"):
                self._remove_unused(path)
            oldest_first = sorted((path for path in self.folder.iterdir() if path.name[0] != "."), key=_touched)
            while not self._fits(wanted):
                if not oldest_first:
                    return False
                self._remove_unused(oldest_first.pop(0))
        return True

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:32]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process looks for a folder or removes one meanwhile."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _fits(self, wanted: int) -> bool:
        free = shutil.disk_usage(self.folder).free
        return self._bytes() + wanted <= self.max_bytes and free - wanted >= self.free_bytes

    def _bytes(self) -> int:
        total = 0
        for folder, _, names in os.walk(self.folder):  # passes over folders that disappear meanwhile
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def _remove_unused(self, path: Path) -> None:
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # gone, or another user's
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed first: half a folder must not be taken for a whole one.
            aside = path.with_name(f"{UNPACKING}removed-{path.name.removeprefix(UNPACKING)}")
            os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError:  # in use, or another user's
            pass
        finally:
            os.close(lock)


def disk_is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _gigabytes(name: str, default: float) -> float:
    """A setting in GB, in bytes; CacheError if it is not a number of 0 or more."""
    text = os.environ.get(name)
    try:
        value = float(text) if text else default
        if not 0 <= value < math.inf:
            raise ValueError
    except ValueError as error:
        raise CacheError(f"{name} is {text[:100]}; give a number of gigabytes, 0 or more") from error
    return value * 1e9


def _cache_folder() -> Path:
    """The folder of unpacked weights, created in the first place that can be written to."""
    named = os.environ.get("CLIP_GEN_CACHE")
    try:
        return _writable(Path(named).expanduser() if named else Path.home() / ".cache" / "clip-gen")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        if named:
            reason = getattr(error, "strerror", None) or str(error)
            raise CacheError(
                f"CLIP_GEN_CACHE is {named[:100]}, which cannot be written to ({reason}); name another folder"
            ) from error
    own = Path(tempfile.gettempdir()) / f"clip-gen-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        stat = own.lstat()
        if stat.st_uid != os.getuid() or stat.st_mode & 0o077 or own.is_symlink():
            raise PermissionError("others can write to it")
        return _writable(own)
    except OSError as error:
        raise CacheError(
            f"{own}: cannot be used as the weights cache ({error.strerror or error}); set CLIP_GEN_CACHE to a folder"
        ) from error


def _writable(folder: Path) -> Path:
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    if not os.access(weights, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return weights


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
