"""The model folder on disk: load and save. The only door to weights files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_gen.config import ModelConfig, read_config, read_settings, write_config
from clip_gen.files import atomic_file, atomic_folder, check_replaceable
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.discriminator import build_discriminator, discriminator_layers
from clip_gen.networks.gpt import GPT, with_null_condition
from clip_gen.networks.skip_init import Unfilled
from clip_gen.networks.vqgan import VQGAN

CONFIG = "config.yaml"
TRAINING = "training.json"
PARTS = ("clip", "vqgan", "gpt", "bridge")
FILES = (CONFIG, TRAINING, *(f"{part}.safetensors" for part in PARTS))
DISCRIMINATOR = "discriminator.safetensors"  # of a published VQGAN, for fine-tuning; predicting never looks at it
DIGESTS = "digests"  # in training.json
# Tensors that tell one codebook from another, and one transformer from another of the same size.
TOLD_BY = {"vqgan": "quantizer.", "gpt": "head."}
SAMPLE = 2**18  # enough to tell networks apart; all of a large one would delay loading by a tenth of a second
MAX_TEXT_BYTES = {CONFIG: 2**16, TRAINING: 2**26}
MAX_JSON_LISTS = 2**19  # and objects, in training.json: each takes many times its two characters of memory


_REMEDIES = {
    "clip": ", or add a CLIP to it by: python -m clip_gen import clip",
    "gpt": ", or train its transformer (stage 2)",
}


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


def load_networks(folder: str | Path, device: str | torch.device = "cpu", fresh: Collection[str] = ()) -> Networks:
    """Reads a model folder, strictly. ModelFolderError when a file is missing, damaged or of another shape.

    Only the parts named in `fresh` may be missing: they start at random.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such model folder; give one that holds {CONFIG} and its weights")
    config = load_config(folder)
    try:
        with torch.device("meta"):  # shapes without memory: a config may ask for more than there is
            planned = build(config)
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, TypeError) as error:
        raise ModelFolderError(f"{folder / CONFIG}: its sizes describe no network ({error}); correct it") from error
    files = {part: folder / f"{part}.safetensors" for part in PARTS}
    missing = [part for part in fresh if not files[part].is_file()]
    tensors = {part: read_part(getattr(planned, part), files[part]) for part in PARTS if part not in missing}
    with Unfilled():
        networks = build(config)
    for part in tensors:
        _assign(getattr(networks, part), tensors[part])
    if missing:
        started = build(config)
        networks = replace(networks, **{part: getattr(started, part) for part in missing})
    for part in PARTS:
        getattr(networks, part).to(device).eval().requires_grad_(False)
    return networks


def load_base(folder: str | Path) -> Networks:
    """A model folder to train on: the transformer that an imported VQGAN lacks starts at random, and one that was
    published without a null condition gets one to learn."""
    networks = load_networks(folder, fresh=("gpt", "bridge"))
    gpt = with_null_condition(networks.gpt)
    return replace(networks, gpt=gpt, config=replace(networks.config, gpt=gpt.config))


def _assign(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts the file's tensors in the place of the network's, in the network's types.

    A parameter that is in its type already stays where it is, in the mapped file; buffers are small, and may change.
    """
    parameters = dict(network.named_parameters())
    for name, wanted in network.state_dict().items():
        found = tensors.pop(name)
        tensors[name] = found.to(wanted.dtype, copy=name not in parameters)
    network.load_state_dict(tensors, assign=True)


def load_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelFolderError(f"{path}: missing; a model folder needs it. Copy the whole folder again")
    try:
        _text(path)
        config = read_config(path, ModelConfig)
        config.check()
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise ModelFolderError(f"{reason}. Copy the model folder again, or correct {path}") from error
    return config


def load_record(folder: Path) -> dict[str, object]:
    """What training.json says of a model; empty where there is none. ModelFolderError if it cannot be read."""
    path = folder / TRAINING
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        text = _text(path)
        if text.count("[") + text.count("{") > MAX_JSON_LISTS:
            raise ValueError(f"over {MAX_JSON_LISTS:,} lists and objects")
        record = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: cannot be read ({error}); copy it again, or remove it") from error
    if not isinstance(record, dict):
        raise ModelFolderError(f"{path}: holds {shown(record)}, not a JSON object; copy it again, or remove it")
    return record


def shown(value: object) -> str:
    """A value from a file in few characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _text(path: Path) -> str:
    """What a text file of a model folder says. Model folders come from strangers, so it is not read however long."""
    if path.stat().st_size > MAX_TEXT_BYTES[path.name]:
        raise ValueError(f"over {MAX_TEXT_BYTES[path.name]:,} bytes long")
    return path.read_text(encoding="utf-8")


def knows_its_tokens(folder: Path) -> bool:
    """Whether a model folder has a transformer, and one that learnt the tokens of the VQGAN beside it."""
    return (folder / "gpt.safetensors").is_file() and why_noise(folder) is None


def why_noise(folder: Path) -> str | None:
    """Why the transformer in a model folder writes tokens that mean nothing to the VQGAN beside it, or None."""
    record = load_record(folder)
    before, now = _section(record, DIGESTS), digests(folder)
    for part in now:
        if before and before.get(part) != now[part]:
            return (
                f"{part}.safetensors is not the one that {TRAINING} describes, so the transformer and the VQGAN belong "
                "to different models and draw noise together; copy the whole folder again, or train stage transformer "
                "from it"
            )
    vqgan = _section(_section(record, "stages"), "vqgan")
    if _section(record, "settings").get("stage") == "vqgan" and not vqgan.get("tokens_kept"):
        return (
            "its transformer does not know its VQGAN's tokens, so that it draws noise; train stage transformer "
            "from these weights"
        )
    return None


def _section(record: dict[str, object], name: str) -> dict[str, object]:
    """A JSON object inside a JSON object; empty where there is none."""
    section = record.get(name)
    return section if isinstance(section, dict) else {}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the codebook and of the transformer's last layer, or of their first SAMPLE numbers each."""
    found = {}
    for part, beginning in TOLD_BY.items():
        path = folder / f"{part}.safetensors"
        if not path.is_file():
            continue
        with _opened(path) as file:
            digest = hashlib.sha256()
            for name in sorted(file.keys()):
                if name.startswith(beginning):
                    digest.update(file.get_tensor(name).flatten()[:SAMPLE].view(torch.uint8).numpy())
        found[part] = digest.hexdigest()
    return found


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; ModelFolderError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: damaged ({error}); copy it again") from error


def load_discriminator(folder: Path) -> nn.Module | None:
    """The one that a VQGAN was published with, to continue fine-tuning from; None where there is none.

    ModelFolderError when the file is damaged or holds something else.
    """
    path = folder / DISCRIMINATOR
    if not path.exists() and not path.is_symlink():
        return None
    try:
        with safe_open(path, "pt") as file:  # it may have other sizes than ours
            layers = discriminator_layers(file.keys())
            channels = file.get_slice("main.0.weight").get_shape()[0]
        if not channels:
            raise ValueError("its first layer has no channels")
        with torch.device("meta"):  # a damaged file may describe a network larger than the memory
            planned = build_discriminator(channels, layers)
        tensors = read_part(planned, path)
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        raise ModelFolderError(
            f"{path}: is damaged or not a discriminator; copy it again, or remove it to train with a new one"
        ) from error
    network = build_discriminator(channels, layers)
    network.load_state_dict(tensors)
    return network


def load_part(network: nn.Module, path: Path) -> None:
    """Fills the network from a safetensors file; as strict as read_part."""
    network.load_state_dict(read_part(network, path))


def read_part(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file's tensors, memory-mapped: exactly those of the network, in their shapes, every number finite."""
    if not path.is_file():
        raise ModelFolderError(f"{path}: missing; copy the whole model folder again{_REMEDIES.get(path.stem, '')}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: damaged ({error}); copy it again") from error
    problem = _mismatch(network.state_dict(), tensors)
    if problem:
        raise ModelFolderError(f"{path}: {problem}; it belongs to another {CONFIG} than the one beside it")
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ModelFolderError(f"{path}: {name} holds numbers that are not finite; copy it again, or train again")
    return tensors


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN. Looks at the extremes alone: ten times as fast as asking each number."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _mismatch(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """What keeps these tensors from fitting, or None."""
    for name in wanted:
        if name not in found:
            return f"has no tensor {name}"
        if wanted[name].shape != found[name].shape:
            return f"{name} has shape {tuple(found[name].shape)}, wanted is {tuple(wanted[name].shape)}"
        # Others would lose digits or their imaginary part, and torch computes with no float of 8 bits.
        floats = wanted[name].is_floating_point()
        if floats != found[name].is_floating_point() or (floats and found[name].element_size() < 2):
            return f"{name} has numbers of type {_type(found[name])}, wanted is {_type(wanted[name])}"
    extra = sorted(set(found) - set(wanted))
    return f"has a tensor that does not belong to this network, {extra[0]}" if extra else None


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_model_folder(folder: Path) -> None:
    """ValueError unless the folder is new, empty, or a model folder and nothing else, which may be replaced."""
    check_replaceable(folder, "model folder", (*FILES, DISCRIMINATOR), _has_model_config)


def _has_model_config(folder: Path) -> bool:
    try:
        settings = read_settings(folder / CONFIG)
    except ValueError:
        return False
    return all(isinstance(settings.get(part), dict) for part in ("clip", "vqgan", "gpt"))


def save_networks(networks: Networks, folder: str | Path, training: dict[str, object]) -> None:
    """Writes a model folder, all of it or nothing, in the place of one that is there; parameters as float16."""
    check_model_folder(Path(folder))
    with atomic_folder(Path(folder)) as temporary:
        for part in PARTS:
            save_part(getattr(networks, part), temporary / f"{part}.safetensors")
        write_description(temporary, networks.config, training)


def write_description(folder: Path, config: ModelConfig, training: dict[str, object]) -> None:
    """The two text files of a model folder whose weights are written already."""
    write_config(config, folder / CONFIG)
    training = {DIGESTS: digests(folder)} | training
    (folder / TRAINING).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def save_part(network: nn.Module, path: Path) -> None:
    """One network's tensors, atomically. Buffers (running means, codebooks) keep float32: they can overflow."""
    tensors = network.state_dict()
    try:
        write_part(narrowed(tensors, dict(network.named_parameters()), torch.float16), path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}; train again at a lower rate") from error


def narrowed(tensors: dict[str, Tensor], names: Collection[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same with those of these names in this type; None keeps theirs. ValueError for what the type cannot hold."""
    kept = {}
    for name, tensor in tensors.items():
        kept[name] = tensor.to(dtype) if dtype and name in names else tensor
        # Numbers that are too large for float16, or NaN: a training that went wrong.
        if not all_finite(kept[name]):
            raise ValueError(f"{name} holds numbers that {_type(kept[name])} cannot")
    return kept


def write_part(tensors: dict[str, Tensor], path: Path) -> None:
    """A weights file, atomically. OSError when the disk does not take it."""
    with atomic_file(path) as temporary:
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:
            raise OSError(
                f"{path}: could not be written ({error}); make room, and start the same command again"
            ) from error
