"""Tensors of foreign checkpoints, renamed and converted to those of our networks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_gen.networks.discriminator import build_discriminator, discriminator_layers
from clip_gen.weights.model_folder import all_finite, narrowed, on_meta

REMEDY = "give the whole checkpoint, of the format and the network that this command imports"


@dataclass(frozen=True)
class Source:
    """The foreign tensor, or the part of it, that becomes one of our tensors."""

    name: str
    part: int = 0
    of: int = 1  # the foreign tensor is this many of ours, concatenated
    trailing_ones: int = 0  # our last dimensions of size one, which the foreign tensor lacks
    leading_one: bool = False  # the foreign tensor has one more dimension in front, of size one

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        """The shape that the foreign tensor must have."""
        sizes = ours[: len(ours) - self.trailing_ones]
        whole = (sizes[0] * self.of, *sizes[1:]) if sizes else ()
        return (1, *whole) if self.leading_one else whole

    def take(self, theirs: Tensor, ours: torch.Size) -> Tensor:
        return theirs.reshape(self.of, *ours)[self.part]


def renamed(name: str, names: dict[str, str]) -> str:
    """The name with each of these parts replaced, longer ones first."""
    parts = sorted(names, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, parts)), lambda part: names[part[0]], name)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a foreign checkpoint, by its names."""

    path: Path
    tensors: dict[str, Tensor]
    prefix: str = ""  # removed from the names; shown in messages

    def find(self, name: str) -> Tensor:
        """A tensor; ValueError if it is missing."""
        if name not in self.tensors:
            kept = f", only others such as {self.prefix}{min(self.tensors)}" if self.tensors else ""
            raise ValueError(f"{self.path}: has no key {self.prefix}{name}{kept}; {REMEDY}")
        return self.tensors[name]

    def size(self, name: str, axis: int = 0) -> int:
        """One size of a tensor; ValueError if it is missing or zero."""
        shape = tuple(self.find(name).shape)
        if not -len(shape) <= axis < len(shape) or shape[axis] == 0:
            raise ValueError(f"{self.path}: {self.prefix}{name} has shape {shape}; {REMEDY}")
        return shape[axis]

    def count(self, beginning: str) -> int:
        """Number of layers in a list: of different words between this beginning and the next dot."""
        cut = len(beginning)
        return len({name[cut:].split(".")[0] for name in self.tensors if name.startswith(beginning)})

    def under(self, prefix: str) -> Checkpoint:
        """The tensors with this prefix, which is removed."""
        inside = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return Checkpoint(self.path, inside, self.prefix + prefix)

    def without(self, *prefixes: str) -> Checkpoint:
        left = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(prefixes)}
        return Checkpoint(self.path, left, self.prefix)

    def converted(
        self, network: nn.Module, sources: dict[str, Source], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The network's tensors; parameters in `dtype`, or in their own type if it is None.

        ValueError with the key that is missing, unexpected, of another shape, or out of range.
        """
        converted = {}
        for name, wanted in network.state_dict().items():
            source = sources[name]
            tensor, shape = self.find(source.name), source.shape(wanted.shape)
            key = f"{self.path}: {self.prefix}{source.name}"
            if tensor.shape != shape:
                raise ValueError(f"{key} has shape {tuple(tensor.shape)}, wanted is {shape}; {REMEDY}")
            if not all_finite(tensor):
                raise ValueError(f"{key} holds numbers that are not finite; give another file")
            converted[name] = source.take(tensor, wanted.shape)
        unexpected = sorted(set(self.tensors) - {sources[name].name for name in converted})
        if unexpected:
            raise ValueError(f"{self.path}: has an unexpected key {self.prefix}{unexpected[0]}; {REMEDY}")
        return narrowed(network, converted, dtype, self.path, "convert it with --dtype float32")


def convert_discriminator(checkpoint: Checkpoint, body: str = "main", head: str | None = None) -> dict[str, Tensor]:
    """The tensors of a VQGAN's discriminator under taming's names, `main.<i>...`; empty if the checkpoint has none.

    body: the checkpoint's name of the list of layers. head: its name of the last layer, if that is not in the list.
    """
    if not checkpoint.tensors:
        return {}
    layers, channels = discriminator_layers(checkpoint.tensors), checkpoint.size(f"{body}.0.weight")
    network = on_meta(lambda: build_discriminator(channels, layers), checkpoint.path, REMEDY)
    last = f"main.{3 * layers + 2}"
    names = {"main": body, last: head or last}
    return checkpoint.converted(network, {name: Source(renamed(name, names)) for name in network.state_dict()})
