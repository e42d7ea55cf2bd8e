"""The model folder on disk: load and save. The only door to weights files."""

from __future__ import annotations

import json
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
