"""Foreign tensors, renamed and converted key by key."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from clip_gen.weights.model_folder import all_finite, narrowed

Network = TypeVar("Network", bound=nn.Module)

REMEDY = "give the whole checkpoint, of the format and the network that this command imports"


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from."""

    name: str
    part: int = 0
    of: int = 1  # theirs holds this many of ours, one after the other
    trimmed: int = 0  # theirs lacks so many of our last sizes, all of them one
    framed: bool = False  # theirs has one more size, a one in front

    def shape(self, ours: torch.Size) -> tuple[int, ...]:
        """The shape theirs must have."""
        sizes = ours[: len(ours) - self.trimmed]
        whole = (sizes[0] * self.of, *sizes[1:]) if sizes else ()
        return (1, *whole) if self.framed else whole

    def take(self, theirs: Tensor, ours: torch.Size) -> Tensor:
        return theirs.reshape(self.of, *ours)[self.part]


def weight_and_bias(ours: str, theirs: str) -> dict[str, Source]:
    """Of a layer that is the same on both sides."""
    return {f"{ours}.{kind}": Source(f"{theirs}.{kind}") for kind in ("weight", "bias")}


@dataclass(frozen=True)
class Foreign:
    """A checkpoint's tensors by their own names."""

    path: Path
    tensors: dict[str, Tensor]
    prefix: str = ""  # already cut off the names, put back in what users read

    def find(self, name: str) -> Tensor:
        """ValueError that names the key when it is not there."""
        if name not in self.tensors:
            kept = f", only others such as {self.prefix}{min(self.tensors)}" if self.tensors else ""
            raise ValueError(f"{self.path}: has no key {self.prefix}{name}{kept}; {REMEDY}")
        return self.tensors[name]

    def size(self, name: str, axis: int = 0) -> int:
        """One size of a tensor, from which a network's sizes are inferred."""
        shape = tuple(self.find(name).shape)
        if not -len(shape) <= axis < len(shape) or shape[axis] == 0:
            raise ValueError(f"{self.path}: {self.prefix}{name} has shape {shape}; {REMEDY}")
        return shape[axis]

    def count(self, beginning: str) -> int:
        """How many different words follow this beginning, up to the next dot: the layers of a list."""
        cut = len(beginning)
        return len({name[cut:].split(".")[0] for name in self.tensors if name.startswith(beginning)})

    def under(self, prefix: str) -> Foreign:
        """Those whose names begin so, without the beginning."""
        inside = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return Foreign(self.path, inside, self.prefix + prefix)

    def without(self, *prefixes: str) -> Foreign:
        left = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(prefixes)}
        return Foreign(self.path, left, self.prefix)

    def converted(
        self, network: nn.Module, sources: dict[str, Source], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The network's tensors, made of these; its parameters in `dtype`, or in their own.

        ValueError naming the key that is missing, of another shape, left over, or has numbers out of range.
        """
        made = {}
        for ours, wanted in network.state_dict().items():
            source = sources[ours]
            found, shape = self.find(source.name), source.shape(wanted.shape)
            if found.shape != shape:
                name = f"{self.path}: {self.prefix}{source.name}"
                raise ValueError(f"{name} has shape {tuple(found.shape)}, wanted is {shape}; {REMEDY}")
            made[ours] = source.take(found, wanted.shape)
        left = sorted(set(self.tensors) - {sources[ours].name for ours in made})
        if left:
            raise ValueError(f"{self.path}: has an unexpected key {self.prefix}{left[0]}; {REMEDY}")
        try:
            return narrowed(made, dict(network.named_parameters()), dtype)
        except ValueError as error:
            bad = next((name for name, tensor in self.tensors.items() if not all_finite(tensor)), None)
            if bad is None:
                raise ValueError(f"{self.path}: {error}; convert it with --dtype float32") from error
            raise ValueError(
                f"{self.path}: {self.prefix}{bad} holds numbers that are not finite: the file is damaged or its "
                "training went wrong; give another"
            ) from error


def planned(build: Callable[[], Network], path: Path, remedy: str = REMEDY) -> Network:
    """The network's names and shapes without its memory; ValueError when the sizes in that file make none."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors without elements: the shapes will not fit
            return build()
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: its sizes describe no network ({error}); {remedy}") from error
