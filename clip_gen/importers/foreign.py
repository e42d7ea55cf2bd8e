"""Foreign checkpoint files: read without executing anything in them, then renamed key by key."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from clip_gen.checkpoint import narrowed
from clip_gen.files import digest_of

Network = TypeVar("Network", bound=nn.Module)

WRAPPERS = ("state_dict", "model")  # under which a training keeps its tensors: Lightning's name, HFAiLab's

# What a damaged or hostile file can make torch's restricted unpickler raise.
UNREADABLE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, TypeError),
    *(LookupError, AttributeError, AssertionError, UnicodeError, OverflowError, MemoryError),
)


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
            raise ValueError(f"{self.path}: has no key {self.prefix}{name}; give the whole checkpoint, as published")
        return self.tensors[name]

    def size(self, name: str, axis: int = 0) -> int:
        """One size of a tensor, from which a network's sizes are inferred."""
        shape = self.find(name).shape
        if axis >= len(shape):
            raise ValueError(f"{self.path}: {self.prefix}{name} has shape {tuple(shape)}; it is of another format")
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
                raise ValueError(
                    f"{self.path}: {self.prefix}{source.name} has shape {tuple(found.shape)}, wanted is {shape}; "
                    "the file is damaged or of another format"
                )
            made[ours] = source.take(found, wanted.shape)
        left = sorted(set(self.tensors) - {sources[ours].name for ours in made})
        if left:
            raise ValueError(f"{self.path}: has an unexpected key {self.prefix}{left[0]}; it is of another format")
        try:
            return narrowed(made, dict(network.named_parameters()), dtype)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; convert it with --dtype float32, or get another") from error


def planned(build: Callable[[], Network], path: Path) -> Network:
    """The network's names and shapes without its memory; ValueError when the file's sizes make none."""
    try:
        with torch.device("meta"):
            return build()
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, TypeError) as error:
        raise ValueError(f"{path}: its sizes describe no network ({error}); it is of another format") from error


def read_checkpoint(path: Path) -> Foreign:
    """The tensors of a torch.save file, memory-mapped where they can be. Nothing in it is executed.

    They may lie at the top, or as a training leaves them: under a name of WRAPPERS, beside whatever else.
    """
    check_there(path)
    try:
        content = _load(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint ({first_words(error)}); get it again") from error
    if isinstance(content, dict):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds no tensors by name; give a checkpoint as it was published")
    for name, tensor in content.items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise ValueError(f"{path}: {str(name)[:100]} is no plain tensor; give a checkpoint as it was published")
    return Foreign(path, {name: tensor.detach() for name, tensor in content.items()})


def check_there(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a checkpoint")


def first_words(error: Exception) -> str:
    """What an error of torch's says, without its pages of advice, as part of a sentence."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in str(error).split("\n\n")]
    said = [text for text in paragraphs if text and not text.startswith(("Weights only load failed", "Check the"))]
    text = said[0] if said else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _load(path: Path) -> object:
    zipped = zipfile.is_zipfile(path)  # what torch has written since 1.6; only that can be mapped
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)


def _stand_in(name: str) -> type:
    """An inert class in the place of one that a checkpoint asks for: takes anything, does nothing, keeps nothing."""
    # The unpickler fills only true dicts, and refuses to go on where it cannot.
    mapping = name.lower().endswith("dict")

    class StandIn:
        def __new__(cls, *args: object) -> object:
            return OrderedDict() if mapping else object.__new__(cls)

        def __init__(self, *args: object):
            pass

        def __setstate__(self, state: object) -> None:
            pass

    return StandIn


def origin(path: Path) -> dict[str, object]:
    """What training.json says of a file that weights came from."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest_of(path)}
