"""LPIPS from two published files, torchvision's VGG-16 and LPIPS's linear layers, to one folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.weights.importers.reader import origin, read_checkpoint
from clip_gen.weights.importers.single_network import check_network_folder, write_network_folder
from clip_gen.weights.importers.state_dict import Checkpoint, Source

WEIGHTS, RECORD = "lpips.safetensors", "lpips.json"
# The layers of VGG-16 that LPIPS does not use.
CLASSIFIER = [f"classifier.{layer}.{kind}" for layer in (0, 3, 6) for kind in ("weight", "bias")]


def import_lpips(vgg: Path, linear: Path, out: Path, urls: dict[str, str], dtype: torch.dtype) -> None:
    """Writes a folder with the weights in `dtype` and a record of their origin, atomically.

    urls: where "vgg" and "linear" are published, for the record. ValueError with the file and the key that is wrong.
    """
    check_lpips_folder(out)
    tensors = convert_lpips(read_checkpoint(vgg), read_checkpoint(linear), dtype)
    sources = {"vgg": ("torchvision", vgg), "linear": ("lpips", linear)}
    imported = {part: {"format": form, **origin(path), "url": urls[part]} for part, (form, path) in sources.items()}
    write_network_folder(out, WEIGHTS, RECORD, tensors, imported)


def check_lpips_folder(out: Path) -> None:
    """ValueError unless the folder is new, empty or an LPIPS folder, which may be replaced."""
    check_network_folder(out, "LPIPS", WEIGHTS, RECORD)


def convert_lpips(vgg: Checkpoint, linear: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of FrozenLPIPS. ValueError with a key that is missing, unexpected or of another shape."""
    with torch.device("meta"):
        network = FrozenLPIPS()
    # Our layers, inside slices, have the numbers of VGG's features.
    sources = {ours: Source(f"features.{ours.partition('.')[2]}") for ours in network.net.state_dict()}
    convolutions = vgg.without(*CLASSIFIER).converted(network.net, sources, dtype)
    layers = nn.ModuleDict({name: layer for name, layer in network.named_children() if name.startswith("lin")})
    weights = linear.converted(layers, {name: Source(name) for name in layers.state_dict()}, dtype)
    return {f"net.{name}": tensor for name, tensor in convolutions.items()} | weights
