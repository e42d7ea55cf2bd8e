"""The model folder on disk: load, save, tar, fetch. The only door to weights files."""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import io
import json
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_gen.bridge import Bridge
from clip_gen.clip_encoder import ClipEncoder
from clip_gen.config import ModelConfig, read_config, write_config
from clip_gen.files import whole_or_not
from clip_gen.gpt import GPT
from clip_gen.vqgan import VQGAN

CONFIG = "config.yaml"
TRAINING = "training.json"
PARTS = ("clip", "vqgan", "gpt", "bridge")
FILES = (CONFIG, TRAINING, *(f"{part}.safetensors" for part in PARTS))

MOST_BYTES = 16 * 2**30  # of one unpacked weights tar; the published size is under one
KEPT = 4  # unpacked weights in the cache
TIMEOUT_SECONDS = 60  # without a byte from a server


class ModelFolderError(ValueError):
    """A model folder that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Networks:
    """A model folder in memory, every network frozen and in eval mode."""

    config: ModelConfig
    clip: ClipEncoder
    vqgan: VQGAN
    gpt: GPT
    bridge: Bridge


def build(config: ModelConfig) -> Networks:
    """The networks at these sizes with a random start."""
    return Networks(
        config,
        ClipEncoder(config.clip),
        VQGAN(config.vqgan),
        GPT(config.gpt),
        Bridge(config.clip.embed_dim, config.bridge),
    )


def load_networks(folder: str | Path, device: str | torch.device = "cpu") -> Networks:
    """Reads a model folder, strictly. ModelFolderError when anything is missing, damaged or of another shape."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such model folder; give one that holds {CONFIG} and its weights")
    networks = build(load_config(folder))
    for part in PARTS:
        network = getattr(networks, part)
        load_part(network, folder / f"{part}.safetensors")
        network.to(device).eval().requires_grad_(False)
    return networks


def load_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelFolderError(f"{path}: missing; a model folder needs it. Copy the whole folder again")
    try:
        config = read_config(path, ModelConfig)
        config.check()
    except ValueError as error:
        raise ModelFolderError(f"{error}. Copy the model folder again, or mend {path}") from error
    return config


def load_part(network: nn.Module, path: Path) -> None:
    """Fills the network from a safetensors file that must hold exactly its tensors, in their shapes."""
    if not path.is_file():
        raise ModelFolderError(f"{path}: missing; copy the whole model folder again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: damaged ({error}); copy it again") from error
    problem = _mismatch(network.state_dict(), tensors)
    if problem:
        raise ModelFolderError(f"{path}: {problem}; it belongs to another {CONFIG} than the one beside it")
    network.load_state_dict(tensors)


def _mismatch(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """What keeps these tensors from fitting, or None."""
    for name in wanted:
        if name not in found:
            return f"has no tensor {name}"
        if wanted[name].shape != found[name].shape:
            return f"{name} has shape {tuple(found[name].shape)}, wanted is {tuple(wanted[name].shape)}"
    extra = sorted(set(found) - set(wanted))
    return f"has a tensor nothing asks for, {extra[0]}" if extra else None


def save_networks(networks: Networks, folder: str | Path, training: dict[str, object]) -> None:
    """Writes a model folder, each file whole or not at all; parameters as float16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        save_part(getattr(networks, part), folder / f"{part}.safetensors")
    write_config(networks.config, folder / CONFIG)
    (folder / TRAINING).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def save_part(network: nn.Module, path: Path) -> None:
    """One network's tensors, atomically. Buffers (running means, codebooks) keep float32: they can overflow."""
    parameters = dict(network.named_parameters())
    tensors = {
        name: (tensor.half() if name in parameters else tensor).contiguous().cpu()
        for name, tensor in network.state_dict().items()
    }
    with whole_or_not(path) as temporary:
        save_file(tensors, temporary)


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
