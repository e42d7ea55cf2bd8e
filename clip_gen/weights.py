"""Weights tars: pack, fetch, unpack, cache."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import http.client
import io
import math
import os
import secrets
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from clip_gen.checkpoint import CONFIG, FILES, TRAINING, ModelFolderError, load_config
from clip_gen.download import URLS, open_url
from clip_gen.files import whole_or_not
from clip_gen.tars import tar_files

MOST_BYTES = 4 * 2**30  # in one weights tar; the published model is under two GiB
LEAST_BYTES = 2**20  # that an entry counts for besides its own, so that there cannot be endless empty ones
KEPT = 16  # unpacked weights in the cache: more than a server has slots
RECENT_SECONDS = 10 * 60  # so long nothing that was asked for is removed: somebody may be about to load it
LEFT_OVER_SECONDS = 60 * 60  # longer than a download may take
UNPACKING = ".unpacking-"


def pack(folder: str | Path, path: str | Path) -> None:
    """Writes a weights tar, a model folder with its files at the root; whole or not at all."""
    folder, path = Path(folder), Path(path)
    load_config(folder)
    with whole_or_not(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name in FILES:
            if (folder / name).is_file():
                tar.add(folder / name, arcname=name)


def resolve_weights(weights: str, should_stop: Callable[[], bool] | None = None) -> Path:
    """The model folder behind a local folder, which may be one that a training left, a weights tar, or a URL of one
    (http, https, data).

    Tars are unpacked once into the cache: $CLIP_GEN_CACHE, or ~/.cache/clip-gen. ModelFolderError when there is
    nothing of use, or soon after should_stop says so during a download.
    """
    try:
        if not weights.startswith(URLS):
            weights = os.path.expanduser(weights)
        if not weights.startswith(URLS) and Path(weights).is_dir():
            folder, trained = Path(weights), Path(weights, "model")
            return trained if (trained / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder
        key, stream = _open(weights, should_stop)
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise ModelFolderError(
            f"{_short(weights)}: cannot be opened ({_reason(error)}); "
            "give a model folder, or the path or URL (http, https, data) of a weights tar"
        ) from error
    with stream:
        cache = _cache()
        try:
            return _unpacked(cache, key, stream)
        except (tarfile.TarError, EOFError, http.client.HTTPException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ModelFolderError(f"{cache}: the disk is full; make room, or set CLIP_GEN_CACHE") from error
            raise ModelFolderError(
                f"{_short(weights)}: cannot be read as a weights tar ({_reason(error)}); make one by training"
            ) from error


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _reason(error: Exception) -> str:
    return _short(getattr(error, "strerror", None) or str(error))


def _open(weights: str, should_stop: Callable[[], bool] | None) -> tuple[str, BinaryIO]:
    """A key that changes whenever the tar does, and the tar."""
    if weights.startswith("data:"):
        return weights, io.BytesIO(base64.b64decode(weights.partition(",")[2], validate=True))
    if weights.startswith(URLS):
        reply = open_url(weights, should_stop)
        marks = [reply.headers.get(name) for name in ("ETag", "Last-Modified")]
        if not any(marks):  # the length alone says nothing: retrained weights are as long as before
            marks = [secrets.token_hex()]
        return f"url {weights} {marks} {reply.headers.get('Content-Length')}", reply
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    stat = path.stat()
    return f"file {path.resolve()} {stat.st_size} {stat.st_mtime_ns}", path.open("rb")


def _cache() -> Path:
    """The folder of unpacked weights, created where it can be written to."""
    named = os.environ.get("CLIP_GEN_CACHE")
    try:
        return _writable(Path(named) if named else Path.home() / ".cache" / "clip-gen")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if named:
            raise ModelFolderError(
                f"CLIP_GEN_CACHE is {_short(named)}, which cannot be written to ({_reason(error)}); name another folder"
            ) from error
    own = Path(tempfile.gettempdir()) / f"clip-gen-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        stat = own.lstat()
        if stat.st_uid != os.getuid() or stat.st_mode & 0o077 or own.is_symlink():
            raise PermissionError("others can write to it")
        return _writable(own)
    except OSError as error:
        raise ModelFolderError(
            f"{own}: no place for weights ({_reason(error)}); set CLIP_GEN_CACHE to a folder"
        ) from error


def _writable(folder: Path) -> Path:
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    if not os.access(weights, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return weights


def _unpacked(cache: Path, key: str, stream: BinaryIO) -> Path:
    """The folder that the tar was unpacked to, now or earlier."""
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    with _alone(cache):
        if folder.is_dir():
            os.utime(folder)
            return folder
        _forget_the_oldest(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=UNPACKING, ignore_cleanup_errors=True) as temporary:
        _unpack(stream, Path(temporary))
        with _alone(cache):
            if not folder.is_dir():  # else somebody was faster
                os.replace(temporary, folder)
            os.utime(folder)
    return folder


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """No other thread or process looks into the cache or removes from it meanwhile."""
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack(stream: BinaryIO, folder: Path) -> None:
    """Only plain files with the names of a model folder leave the archive, so that none can land elsewhere."""
    left = MOST_BYTES

    def count(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise ValueError(f"holds more than {MOST_BYTES // 2**30} GiB or thousands of files")

    for member, content in tar_files(stream, count):
        count(LEAST_BYTES)
        inside = member.name.removeprefix("./")
        if content is not None and inside in FILES:
            with (folder / inside).open("wb") as file:
                shutil.copyfileobj(content, file)
    missing = [name for name in FILES if name != TRAINING and not (folder / name).is_file()]
    if missing:
        raise ValueError(f"has no {missing[0]} at its root")


def _forget_the_oldest(cache: Path) -> None:
    """Removes all but the newest folders, and what was left behind by processes that died while unpacking."""
    now = time.time()
    for left_over in cache.glob(f"{UNPACKING}*"):
        if _touched(left_over) < now - LEFT_OVER_SECONDS:
            shutil.rmtree(left_over, ignore_errors=True)
    folders = sorted((path for path in cache.iterdir() if path.name[0] != "."), key=_touched)
    for folder in folders[:-KEPT]:
        if _touched(folder) < now - RECENT_SECONDS:
            # Renamed first: half a folder must not pass for a whole one.
            os.replace(folder, aside := tempfile.mkdtemp(dir=cache, prefix=UNPACKING))
            shutil.rmtree(aside, ignore_errors=True)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its owner was done with it
        return math.inf
