"""Weights tars: pack, fetch, unpack, cache."""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import io
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from clip_gen.checkpoint import FILES, TRAINING, ModelFolderError, load_config
from clip_gen.files import whole_or_not

MOST_BYTES = 16 * 2**30  # of one unpacked weights tar; the published size is under one
KEPT = 4  # unpacked weights in the cache
TIMEOUT_SECONDS = 60  # without a byte from a server


def pack(folder: str | Path, path: str | Path) -> None:
    """Writes a weights tar, a model folder with its files at the root; whole or not at all."""
    folder, path = Path(folder), Path(path)
    load_config(folder)
    with whole_or_not(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name in FILES:
            if (folder / name).is_file():
                tar.add(folder / name, arcname=name)


def resolve_weights(weights: str) -> Path:
    """The model folder behind a local folder, a weights tar, or a URL of one (http, https, data).

    Tars are unpacked once into the cache: $CLIP_GEN_CACHE, or ~/.cache/clip-gen. ModelFolderError when there is
    nothing of use.
    """
    if weights.startswith(("http://", "https://", "data:")):
        return _unpacked(f"url {weights}", lambda: _opened(weights), weights[:100])
    path = Path(weights)
    if path.is_dir():
        return path
    if path.is_file():
        stat = path.stat()
        key = f"file {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        return _unpacked(key, lambda: path.open("rb"), weights)
    raise ModelFolderError(
        f"{weights[:200]!r} is no model folder, no file and no http(s) URL; give one of a weights tar or model folder"
    )


def _opened(url: str) -> BinaryIO:
    if url.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ModelFolderError(f"{url[:60]}...: not base64 ({error}); give a data URL of a weights tar") from error
    return urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS)


def _unpacked(key: str, opened: Callable[[], BinaryIO], name: str) -> Path:
    """The folder a tar was unpacked to, now or earlier."""
    cache = Path(os.environ.get("CLIP_GEN_CACHE") or Path.home() / ".cache" / "clip-gen") / "weights"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if folder.is_dir():
        os.utime(folder)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".unpacking-"))
    try:
        with opened() as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            _unpack(tar, temporary, name)
        os.replace(temporary, folder)
    except (tarfile.TarError, EOFError, http.client.HTTPException, urllib.error.URLError, OSError) as error:
        if folder.is_dir():  # somebody else was faster
            return folder
        raise ModelFolderError(f"{name}: cannot be read as a weights tar ({error}); make one by training") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _forget_the_oldest(cache)
    return folder


def _unpack(tar: tarfile.TarFile, folder: Path, name: str) -> None:
    """Only plain files with the names of a model folder leave the archive, so that none can land elsewhere."""
    left = MOST_BYTES
    for member in tar:
        inside = member.name.removeprefix("./")
        if not member.isfile() or inside not in FILES:
            continue
        left -= member.size
        if left < 0:
            raise ModelFolderError(f"{name}: holds more than {MOST_BYTES // 2**30} GiB; this is no weights tar")
        with (folder / inside).open("wb") as file:
            shutil.copyfileobj(tar.extractfile(member), file)
    # tarfile takes an archive cut off between two files for a whole one.
    missing = [part for part in FILES if part != TRAINING and not (folder / part).is_file()]
    if missing:
        raise ModelFolderError(
            f"{name}: has no {missing[0]} at its root, so it is no weights tar; make one by training"
        )


def _forget_the_oldest(cache: Path) -> None:
    folders = sorted((path for path in cache.iterdir() if path.name[0] != "."), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
