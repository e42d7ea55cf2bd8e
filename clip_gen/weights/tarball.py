"""Packs a model folder to a weights tar, and opens the weights at a path or URL as a model folder."""

from __future__ import annotations

import base64
import http.client
import io
import math
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from clip_gen.data.entries import LINK, NOT_A_FILE, archive_entries
from clip_gen.data.file_kinds import UnusableError
from clip_gen.data.limits import CHUNK, ArchiveError, Limits, Meter, reason_of
from clip_gen.files import atomic_file, shortened
from clip_gen.weights.cache import Cache, CacheError, WeightsFolder
from clip_gen.weights.model_folder import CONFIG, FILES, TEXTS, TRAINING, ModelFolderError, load_config
from clip_gen.weights.url import PublicOnly, is_url, open_url

# The published COCO model has less than 2 GiB.
LIMITS = Limits(max_entries=4096, max_bytes=4 * 2**30, max_ratio=math.inf)
STEP = 64 * 2**20  # bytes written between two checks of the cache's room
MAX_NAME = 4096  # characters of a path in an archive, as on Linux
WANTED = "give a model folder, a training's folder, or the path or URL (http, https, data) of a weights tar"

_in_use: list[WeightsFolder] = []  # keeps the locks of resolve_weights until the process ends


class NotWeightsError(ModelFolderError):
    """The weights cannot be opened, or the file is something else."""


def pack(folder: str | Path, path: str | Path) -> None:
    """Writes a weights tar atomically: the files of a model folder, at the root."""
    folder, path = Path(folder), Path(path)
    load_config(folder)
    with atomic_file(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name in (*FILES, *TEXTS):
            if (folder / name).is_file():
                tar.add(folder / name, arcname=name)


def resolve_weights(weights: str | Path) -> Path:
    """The path of open_weights' folder, which stays until this process ends."""
    _in_use.append(open_weights(weights))
    return _in_use[-1].path


def open_weights(
    weights: str | Path,
    should_stop: Callable[[], bool] | None = None,
    public: PublicOnly | None = None,
    needs_room: bool = False,
    before_unpacking: Callable[[], None] | None = None,
) -> WeightsFolder:
    """Opens a model folder, a training's folder, a weights tar, a zip of a model folder, or a URL of a tar or zip
    (http, https, data). Archives are unpacked once, into the cache, where they stay while the result is in use.

    should_stop: called during a download; True ends it. public: allows only URLs at public addresses. needs_room:
    CacheError if the cache is full of folders in use. before_unpacking: called if the cache lacks these weights.
    ModelFolderError if the weights are unusable or the download was stopped.
    """
    if not isinstance(weights, str | os.PathLike) or not os.fspath(weights):
        raise NotWeightsError(f"the name of the weights is {'empty' if weights == '' else repr(weights)}; {WANTED}")
    name = os.fspath(weights)
    try:
        local = None if is_url(name) else _local(name)
        if local is not None and local.is_dir():
            return WeightsFolder(local)
        key, stream = _open_url(name, should_stop, public) if local is None else _open_file(local)
    except ModelFolderError:
        raise
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise _not_opened(name, error) from error
    with stream:
        cache = Cache()
        try:
            cached = cache.find(key)
            if cached is None and before_unpacking is not None:
                before_unpacking()
                cached = cache.find(key)  # another thread may have unpacked it meanwhile
            return cached or cache.add(key, lambda folder: _fill(folder, stream, name, cache, needs_room))
        except OSError as error:
            raise CacheError(
                f"{cache.folder}: cannot be written to ({reason_of(error)}); make room, or set CLIP_GEN_CACHE"
            ) from error


def _local(name: str) -> Path:
    """The model folder or the file at a local path. NotWeightsError if there is neither."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if not path.is_dir():
        raise NotWeightsError(f"{shortened(name)}: no such file or folder; {WANTED}")
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    if (path / "weights.tar").is_file():
        return path / "weights.tar"
    if (path / "work").is_dir():
        raise NotWeightsError(f"{path}: holds a training that has not ended; start the same command again to finish it")
    raise NotWeightsError(f"{path}: holds no model, its {CONFIG} is missing; copy the whole folder again, or {WANTED}")


def _not_opened(name: str, error: Exception) -> NotWeightsError:
    return NotWeightsError(f"{shortened(name)}: cannot be opened ({reason_of(error)}); {WANTED}")


def _open_file(path: Path) -> tuple[str, BinaryIO]:
    """The cache key of an archive, which changes whenever the archive does, and the archive as a stream."""
    stat = path.stat()
    return f"file {path.resolve()} {stat.st_size} {stat.st_mtime_ns}", path.open("rb")


def _open_url(url: str, should_stop: Callable[[], bool] | None, public: PublicOnly | None) -> tuple[str, BinaryIO]:
    """Like _open_file."""
    if url[:5].lower() == "data:":
        kind, _, text = url[5:].partition(",")
        data = unquote_to_bytes(text)
        return url, io.BytesIO(base64.b64decode(data, validate=True) if kind.lower().endswith(";base64") else data)
    reply = open_url(url, should_stop, public=public)
    versions = [reply.headers.get(name) for name in ("ETag", "Last-Modified")]
    if not any(versions):  # the length says nothing: retrained weights have the same
        versions = [secrets.token_hex()]
    return f"url {url} {versions} {reply.headers.get('Content-Length')}", reply


class _Room(Meter):
    """Also makes room in the cache for what is written. CacheError if there is none, but needs_room."""

    def __init__(self, name: str, cache: Cache, needs_room: bool):
        super().__init__(shortened(name), LIMITS)
        self._cache, self._needs_room, self._granted = cache, needs_room, 0

    def add_bytes(self, count: int) -> None:
        super().add_bytes(count)
        if self._granted < self.bytes:
            self._granted += STEP
            if not self._cache.make_room(STEP) and self._needs_room:
                raise CacheError(
                    f"{self._cache.folder}: has no room for these weights beside those in use; make room on the disk, "
                    "or raise CLIP_GEN_CACHE_GB"
                )


def _fill(folder: Path, stream: BinaryIO, name: str, cache: Cache, needs_room: bool) -> None:
    """Unpacks an archive into a folder of the cache; a download is stored first, since zipfile seeks."""
    with tempfile.NamedTemporaryFile(dir=folder) as download:
        if not stream.seekable():
            room = _Room(name, cache, needs_room)
            try:
                while piece := stream.read(CHUNK):
                    room.add_bytes(len(piece))
                    download.write(piece)
            except (http.client.HTTPException, OSError) as error:
                raise _not_opened(name, error) from error
            download.seek(0)
            stream = download
        _unpack(stream, folder, _Room(name, cache, needs_room))


def _unpack(archive: BinaryIO, folder: Path, room: Meter) -> None:
    """Unpacks a tar or zip of a model folder, whose files may be at the root or in any folder of the archive.

    Writes only files with the names of a model folder. Names in the archive never become paths.
    """
    folders: dict[PurePosixPath, Path] = {}  # in the archive: on disk
    try:
        for entry in archive_entries(archive, room):
            inside = PurePosixPath(entry.name.replace("\\", "/"))
            # Thousands of long names would fill the memory.
            if inside.name not in (*FILES, *TEXTS) or len(entry.name) > MAX_NAME:
                continue
            if entry.error is not None and entry.error.reason in (LINK, NOT_A_FILE):
                continue
            target = folders.setdefault(inside.parent, folder / str(len(folders)))
            if entry.error is not None:
                raise entry.error
            target.mkdir(exist_ok=True)
            with (target / inside.name).open("wb") as file:
                file.writelines(entry.pieces)
    except UnusableError as error:
        raise ModelFolderError(f"{room.name}: a file in it is {error}; pack the whole model folder again") from error
    except ArchiveError as error:
        raise (ModelFolderError if folders else NotWeightsError)(str(error)) from error
    for file in folders[_complete_model(folders, room.name)].iterdir():
        os.replace(file, folder / file.name)
    for path in folders.values():
        shutil.rmtree(path)


def _complete_model(folders: dict[PurePosixPath, Path], name: str) -> PurePosixPath:
    """The complete model folder nearest to the root of the archive; ModelFolderError if there is not exactly one."""
    if not folders:
        raise NotWeightsError(f"{name}: holds no weights, nothing in it is called {CONFIG}; {WANTED}")
    missing = {
        inside: [file for file in FILES if file != TRAINING and not (path / file).is_file()]
        for inside, path in folders.items()
    }
    model, *others = sorted(folders, key=lambda inside: (len(missing[inside]), len(inside.parts)))
    if missing[model]:
        raise ModelFolderError(f"{name}: has no {missing[model][0]}; pack the whole model folder again")
    if others and not missing[others[0]] and len(others[0].parts) == len(model.parts):
        raise ModelFolderError(f"{name}: holds several models, {model} and {others[0]}; pack one of them")
    return model
