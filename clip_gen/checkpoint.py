"""The model folder on disk: load and save. The only door to weights files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

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
    """Reads a model folder, strictly. ModelFolderError when a file is missing, damaged or of another shape."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such model folder; give one that holds {CONFIG} and its weights")
    config = load_config(folder)
    try:
        with torch.device("meta"):  # shapes without memory: a config may ask for more than there is
            planned = build(config)
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, TypeError) as error:
        raise ModelFolderError(f"{folder / CONFIG}: its sizes make no network ({error}); mend it") from error
    tensors = {part: read_part(getattr(planned, part), folder / f"{part}.safetensors") for part in PARTS}
    networks = build(config)
    for part in PARTS:
        network = getattr(networks, part)
        network.load_state_dict(tensors[part])
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
    """Fills the network from a safetensors file; as strict as read_part."""
    network.load_state_dict(read_part(network, path))


def read_part(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file's tensors: exactly those of the network, in their shapes, every number finite."""
    if not path.is_file():
        raise ModelFolderError(f"{path}: missing; copy the whole model folder again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: damaged ({error}); copy it again") from error
    problem = _mismatch(network.state_dict(), tensors)
    if problem:
        raise ModelFolderError(f"{path}: {problem}; it belongs to another {CONFIG} than the one beside it")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelFolderError(f"{path}: {name} holds numbers that are not finite; copy it again, or train again")
    return tensors


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
    """Writes a model folder, all of it or nothing, in the place of one that is there; parameters as float16."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".saving-"))
    try:
        for part in PARTS:
            save_part(getattr(networks, part), temporary / f"{part}.safetensors")
        write_config(networks.config, temporary / CONFIG)
        (temporary / TRAINING).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp's folders are for their owner's eyes only
        if folder.exists():
            os.replace(folder, temporary.with_suffix(".old"))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_suffix(".old"), ignore_errors=True)


def save_part(network: nn.Module, path: Path) -> None:
    """One network's tensors, atomically. Buffers (running means, codebooks) keep float32: they can overflow."""
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        # Larger numbers than float16 holds, or none at all: a training that went wrong.
        if not parameter.half().isfinite().all():
            raise ValueError(f"{path.name}: {name} holds numbers that float16 cannot; train again at a lower rate")
    tensors = {
        name: (tensor.half() if name in parameters else tensor).contiguous().cpu()
        for name, tensor in network.state_dict().items()
    }
    with whole_or_not(path) as temporary:
        save_file(tensors, temporary)
