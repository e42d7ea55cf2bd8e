"""Packs a model folder to a weights tar, and opens the weights at a path or URL as a model folder."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import secrets
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from clip_gen.data.entries import ZIP_STARTS, reason_of
from clip_gen.data.tars import tar_files
from clip_gen.data.zips import SMALL, ZIP_ERRORS, open_zip
from clip_gen.files import atomic_file, disk_is_full, is_web_page, shortened
from clip_gen.weights.cache import Cache, CacheError, WeightsFolder
from clip_gen.weights.model_folder import CONFIG, FILES, TRAINING, ModelFolderError, load_config
from clip_gen.weights.url import PublicOnly, is_url, open_url

MAX_BYTES = 4 * 2**30  # unpacked; the published COCO model has less than 2 GiB
MIN_BYTES = 2**20  # that each file counts for at least, so that an archive cannot hold millions of empty files
STEP = 64 * 2**20  # unpacked bytes between two checks of the cache's room
MAX_NAME = 4096  # characters of a path in an archive, as on Linux
MAX_FOLDERS = 64  # folders of an archive with files named like those of a model folder
CHUNK = 2**20
WANTED = "give a model folder, a training's folder, or the path or URL (http, https, data) of a weights tar"

_in_use: list[WeightsFolder] = []  # keeps the locks of resolve_weights until the process ends


class NotWeightsError(ModelFolderError):
    """The weights cannot be opened, or the file is something else."""


def pack(folder: str | Path, path: str | Path) -> None:
    """Writes a weights tar atomically: the files of a model folder, at the root."""
    folder, path = Path(folder), Path(path)
    load_config(folder)
    with atomic_file(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name in FILES:
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
    (http, https, data).

    Archives are unpacked once, into the cache (cache.py), where the folder stays while the result is in use.
    should_stop: called during a download; True ends it. public: allows only URLs at public addresses. needs_room:
    CacheError if the cache is full of folders in use. before_unpacking: called if the cache lacks these weights.
    ModelFolderError if the weights are unusable or the download was stopped.
    """
    if not isinstance(weights, str | os.PathLike) or not os.fspath(weights):
        raise NotWeightsError(f"the name of the weights is {'empty' if weights == '' else repr(weights)}; {WANTED}")
    name = os.fspath(weights)
    try:
        if not is_url(name):
            folder = _local(name)
            if folder.is_dir():
                return WeightsFolder(folder)
            name = str(folder)
        key, stream = _open(name, should_stop, public)
    except (http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, ModelFolderError):
            raise
        raise NotWeightsError(f"{shortened(name)}: cannot be opened ({_reason(error)}); {WANTED}") from error
    with stream:
        cache = Cache()
        try:
            cached = cache.find(key)
            if cached is None and before_unpacking is not None:
                before_unpacking()
                cached = cache.find(key)  # another thread may have unpacked it meanwhile
            return cached or _unpacked(cache, key, stream, name, needs_room)
        except OSError as error:
            raise CacheError(f"{cache.folder}: cannot be used ({_reason(error)}); set CLIP_GEN_CACHE") from error


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


def _reason(error: Exception) -> str:
    return shortened(reason_of(error))


def _open(weights: str, should_stop: Callable[[], bool] | None, public: PublicOnly | None) -> tuple[str, BinaryIO]:
    """The cache key of an archive, which changes whenever the archive does, and the archive as a stream."""
    if weights[:5].lower() == "data:":
        return weights, io.BytesIO(_data(weights))
    if is_url(weights):
        reply = open_url(weights, should_stop, public=public)
        versions = [reply.headers.get(name) for name in ("ETag", "Last-Modified")]
        if not any(versions):  # the length says nothing: retrained weights have the same
            versions = [secrets.token_hex()]
        return f"url {weights} {versions} {reply.headers.get('Content-Length')}", reply
    path = Path(weights)
    stat = path.stat()
    return f"file {path.resolve()} {stat.st_size} {stat.st_mtime_ns}", path.open("rb")


def _data(url: str) -> bytes:
    """The bytes in a data URL (RFC 2397)."""
    kind, comma, text = url[5:].partition(",")
    if not comma:
        raise ValueError("a data URL needs a comma before its data")
    data = unquote_to_bytes(text)
    if not kind.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its data is not base64: {error}") from error


def _unpacked(cache: Cache, key: str, stream: BinaryIO, name: str, needs_room: bool) -> WeightsFolder:
    def make_room(wanted: int) -> None:
        if not cache.make_room(wanted) and needs_room:
            raise CacheError(
                f"{cache.folder}: has no room for these weights beside those in use; make room on the disk, or raise "
                "CLIP_GEN_CACHE_GB"
            )

    try:
        return cache.add(key, lambda folder: _unpack(stream, folder, make_room))
    except (tarfile.TarError, http.client.HTTPException, *ZIP_ERRORS) as error:
        if isinstance(error, CacheError):
            raise
        if disk_is_full(error):
            raise CacheError(f"{cache.folder}: the disk is full; make room, or set CLIP_GEN_CACHE") from error
        if isinstance(error, ModelFolderError):
            raise type(error)(f"{shortened(name)}: {error}") from error
        raise NotWeightsError(f"{shortened(name)}: cannot be read ({_reason(error)}); {WANTED}") from error


class _Budget:
    """Counts the unpacked bytes and files of an archive. ModelFolderError if they are more than one model has."""

    def __init__(self, make_room: Callable[[int], None]):
        self._left, self._granted, self._make_room = MAX_BYTES, 0, make_room

    def add_bytes(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ModelFolderError(f"holds more than {MAX_BYTES // 2**30} GiB or thousands of files; {WANTED}")
        if self._granted < MAX_BYTES - self._left:
            self._make_room(STEP)
            self._granted += STEP

    def add_entries(self, count: int) -> None:
        self.add_bytes(count * MIN_BYTES)

    def check_entries(self, count: int) -> None:
        if count * MIN_BYTES > self._left:
            self.add_entries(count)


def _unpack(stream: BinaryIO, folder: Path, make_room: Callable[[int], None]) -> None:
    """Unpacks a tar or zip of a model folder, whose files may be at the root or in any folder of the archive.

    Writes only files with the names of a model folder. Names in the archive never become paths.
    """
    folders: dict[PurePosixPath, Path] = {}  # in the archive: on disk
    try:
        for name, pieces in _files(stream, folder, make_room):
            if len(name) > MAX_NAME:  # thousands of long names would fill the memory
                continue
            inside = PurePosixPath(name.replace("\\", "/"))
            if inside.name in FILES:
                if len(folders) == MAX_FOLDERS and inside.parent not in folders:
                    raise ModelFolderError(f"holds model files in more than {MAX_FOLDERS} folders; pack one model")
                target = folders.setdefault(inside.parent, folder / str(len(folders)))
                target.mkdir(exist_ok=True)
                with (target / inside.name).open("wb") as file:
                    file.writelines(pieces)
    except (tarfile.TarError, http.client.HTTPException, *ZIP_ERRORS) as error:
        if not folders or disk_is_full(error) or isinstance(error, ModelFolderError):
            raise
        raise ModelFolderError(f"is damaged or cut off ({_reason(error)}); download or copy it again") from error
    chosen = folders[_complete_model(folders)]
    for file in chosen.iterdir():
        os.replace(file, folder / file.name)
    for path in folders.values():
        shutil.rmtree(path)


def _complete_model(folders: dict[PurePosixPath, Path]) -> PurePosixPath:
    """The complete model folder nearest to the root of the archive; ModelFolderError if there is not exactly one."""
    if not folders:
        raise NotWeightsError(f"holds no weights, nothing in it is called {CONFIG}; {WANTED}")
    missing = {
        inside: [name for name in FILES if name != TRAINING and not (path / name).is_file()]
        for inside, path in folders.items()
    }
    complete = sorted((inside for inside in folders if not missing[inside]), key=lambda inside: len(inside.parts))
    if not complete:
        nearest = min(folders, key=lambda inside: len(missing[inside]))
        raise ModelFolderError(f"has no {missing[nearest][0]}; pack the whole model folder again")
    if len(complete) > 1 and len(complete[0].parts) == len(complete[1].parts):
        raise ModelFolderError(f"holds several models, {complete[0]} and {complete[1]}; pack one of them")
    return complete[0]


def _files(stream: BinaryIO, folder: Path, make_room: Callable[[int], None]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The name of each file in a tar or zip, and its content in pieces. Read it before the next file is requested."""
    buffered = io.BufferedReader(stream)
    start = buffered.peek(512)[:512]
    if not start:
        raise NotWeightsError(f"is empty; {WANTED}")
    if is_web_page(start):
        raise NotWeightsError(f"is an HTML page, not weights; look at its address, and {WANTED}")
    budget = _Budget(make_room)
    if not start.startswith(ZIP_STARTS):
        for member, content in tar_files(buffered, budget.add_bytes):
            budget.add_entries(1)
            if content is not None:
                yield member.name, iter(lambda content=content: content.read(CHUNK), b"")
        return
    with tempfile.NamedTemporaryFile(dir=folder) as copy:  # zipfile needs a file: the table of contents is at the end
        copying = _Budget(make_room)
        while piece := buffered.read(CHUNK):
            copying.add_bytes(len(piece))
            copy.write(piece)
        copy.flush()
        with open_zip(Path(copy.name), budget) as archive:
            for member in archive.filelist:
                if not member.is_dir():
                    yield member.filename, _content(archive, member, budget)


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, budget: _Budget) -> Iterator[bytes]:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks others without a limit
        raise ModelFolderError(f"{member.filename[:100]} in it is compressed in an unusual way; zip the folder again")
    with archive.open(member) as content:
        while piece := content.read(SMALL):
            budget.add_bytes(len(piece))
            yield piece
