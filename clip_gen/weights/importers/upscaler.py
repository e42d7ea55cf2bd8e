"""A published upscaler to a folder, and from there to a network."""

from __future__ import annotations

from pathlib import Path

import torch

from clip_gen.networks.upscaler import Upscaler
from clip_gen.weights.importers.reader import origin, read_checkpoint
from clip_gen.weights.importers.single_network import check_network_folder, write_network_folder
from clip_gen.weights.model_folder import all_finite

WEIGHTS, RECORD = "upscaler.safetensors", "upscaler.json"


def import_upscaler(checkpoint: Path, out: Path, url: str, dtype: torch.dtype | None = None) -> None:
    """Writes a folder with the weights and a record of their origin, atomically. ValueError for other weights.

    url: where the file is published, for the record.
    """
    check_upscaler_folder(out)
    content = read_checkpoint(checkpoint)
    _built(checkpoint, content.tensors, torch.device("cpu"))
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in content.tensors.items()}
    imported = {"upscaler": {"format": "spandrel", **origin(checkpoint), "url": url}}
    write_network_folder(out, WEIGHTS, RECORD, tensors, imported)


def check_upscaler_folder(out: Path) -> None:
    """ValueError unless the folder is new, empty or an upscaler's, which may be replaced."""
    check_network_folder(out, "upscaler", WEIGHTS, RECORD)


def load_upscaler(path: Path, device: torch.device) -> Upscaler:
    """The network of a file that import_upscaler wrote. ValueError if it cannot be used."""
    return _built(path, {name: tensor.float() for name, tensor in read_checkpoint(path).tensors.items()}, device)


def _built(path: Path, tensors: dict[str, torch.Tensor], device: torch.device) -> Upscaler:
    if broken := next((name for name, tensor in tensors.items() if not all_finite(tensor)), None):
        raise ValueError(f"{path}: {broken} holds numbers that are not finite; pull it again")
    try:
        return Upscaler(tensors, device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; pull it again") from error
