"""Loads and saves model folders."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_gen.config import ModelConfig, has_settings, read_config, write_config
from clip_gen.files import MODULE, atomic_file, atomic_folder, check_replaceable, sha256_of
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.discriminator import build_discriminator, discriminator_layers
from clip_gen.networks.gpt import GPT, with_null_condition
from clip_gen.networks.skip_init import SkipInit
from clip_gen.networks.vqgan import VQGAN
from clip_gen.weights.zero_rows import with_zero_rows, without_zero_rows

Built = TypeVar("Built")

CONFIG = "config.yaml"
TRAINING = "training.json"
PARTS = ("clip", "vqgan", "gpt", "bridge")
FILES = (CONFIG, TRAINING, *(f"{part}.safetensors" for part in PARTS))
VOCABULARY = "vocabulary.txt"  # what its CLIP knows: a short list in the first line, then all words
LICENSES = "LICENSES.md"  # of the pictures that the model was trained on
TEXTS = (VOCABULARY, LICENSES)  # may be missing; models trained from this one keep them
DISCRIMINATOR = "discriminator.safetensors"  # of an imported VQGAN, for fine-tuning only
DIGESTS = "digests"  # in training.json
# Prefixes of the tensors that identify a codebook and a transformer.
DIGESTED = {"vqgan": "quantizer.", "gpt": "head."}
SAMPLE = 2**18  # numbers of each tensor in a digest; all of a large one would delay loading by 0.1 s
MAX_TEXT_BYTES = {CONFIG: 2**16, TRAINING: 2**26, VOCABULARY: 2**20, LICENSES: 2**20}
MAX_JSON_LISTS = 2**19  # lists and objects in training.json: each takes far more memory than its two characters


class ModelFolderError(ValueError):
    """A model folder cannot be used. The message names the file and what to do."""


@dataclass(frozen=True)
class Networks:
    """The networks of a model folder, frozen and in eval mode, and its TEXTS by file name."""

    config: ModelConfig
    clip: ClipEncoder
    vqgan: VQGAN
    gpt: GPT
    bridge: Bridge
    texts: Mapping[str, str] = field(default_factory=dict)


def build(config: ModelConfig) -> Networks:
    """Networks of these sizes with random weights."""
    clip, vqgan, gpt = ClipEncoder(config.clip), VQGAN(config.vqgan), GPT(config.gpt)
    return Networks(config, clip, vqgan, gpt, Bridge(config.clip.embed_dim, config.bridge))


def load_networks(folder: str | Path, device: str | torch.device = "cpu", fresh: Collection[str] = ()) -> Networks:
    """Loads a model folder strictly. ModelFolderError if a file is missing, damaged or does not fit config.yaml.

    fresh: the parts that may be missing, and then get random weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such model folder; give one that holds {CONFIG} and its weights")
    config = load_config(folder)
    meta = on_meta(lambda: build(config), folder / CONFIG, "correct it")
    files = {part: folder / f"{part}.safetensors" for part in PARTS}
    files = {part: path for part, path in files.items() if part not in fresh or path.is_file()}
    tensors = {part: read_part(getattr(meta, part), path) for part, path in files.items()}
    with SkipInit() if len(files) == len(PARTS) else nullcontext():
        networks = build(config)
    for part in PARTS:
        if part in tensors:
            _assign(getattr(networks, part), tensors[part])
        getattr(networks, part).to(device).eval().requires_grad_(False)
    return replace(networks, texts=load_texts(folder))


def on_meta(build: Callable[[], Built], path: Path, remedy: str) -> Built:
    """Networks on the meta device, for names and shapes: a file may describe networks larger than the memory.

    ModelFolderError if its sizes describe none.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about empty tensors, whose shapes will not fit
            return build()
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, TypeError, LookupError, NameError) as error:
        raise ModelFolderError(f"{path}: its sizes describe no network ({error}); {remedy}") from error


def load_base(folder: str | Path, needs_vqgan: bool = True, keeps_memory: bool = False) -> Networks:
    """Loads a model folder for training, without the bridge's memory. A missing transformer gets random weights.

    needs_vqgan: False if a missing VQGAN gets random weights too. keeps_memory: until forget_memory drops it.
    """
    networks = load_networks(folder, fresh=("gpt", "bridge") if needs_vqgan else ("vqgan", "gpt", "bridge"))
    gpt = with_null_condition(networks.gpt)
    networks = replace(networks, gpt=gpt, config=replace(networks.config, gpt=gpt.config))
    return networks if keeps_memory else forget_memory(networks)


def forget_memory(networks: Networks) -> Networks:
    """Drops what belongs to the pictures that these networks were trained on."""
    return replace(networks, config=replace(networks.config, bridge=networks.bridge.without_memory().config))


def _assign(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replaces the network's tensors by the file's, in the network's types.

    Parameters that need no conversion stay memory-mapped. Buffers are copied, since they may change.
    """
    parameters = dict(network.named_parameters())
    for name, wanted in network.state_dict().items():
        tensors[name] = tensors[name].to(wanted.dtype, copy=name not in parameters)
    network.load_state_dict(tensors, assign=True)


def load_config(folder: Path) -> ModelConfig:
    path = folder / CONFIG
    _check_file(path)
    try:
        _text(path)
        config = read_config(path, ModelConfig)
        config.check()
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ModelFolderError(f"{path}: {reason}. Copy the model folder again, or correct this file") from error
    return config


def load_record(folder: Path) -> dict[str, object]:
    """The content of training.json; empty if there is none. ModelFolderError if it cannot be read."""
    path = folder / TRAINING
    if not os.path.lexists(path):
        return {}
    try:
        text = _text(path)
        if text.count("[") + text.count("{") > MAX_JSON_LISTS:
            raise ValueError(f"over {MAX_JSON_LISTS:,} lists and objects")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: cannot be read ({error}); copy it again, or remove it") from error
    return record


def load_texts(folder: Path) -> dict[str, str]:
    """The TEXTS of a model folder by file name. ModelFolderError if one cannot be read."""
    texts = {}
    for path in (folder / name for name in TEXTS if (folder / name).is_file()):
        try:
            texts[path.name] = _text(path)
        except (OSError, ValueError) as error:
            raise ModelFolderError(f"{path}: cannot be read ({error}); copy it again, or remove it") from error
    return texts


def _text(path: Path) -> str:
    """The text of a file of a model folder. Its length is limited, since model folders come from strangers."""
    if path.stat().st_size > MAX_TEXT_BYTES[path.name]:
        raise ValueError(f"over {MAX_TEXT_BYTES[path.name]:,} bytes long")
    return path.read_text(encoding="utf-8")


def transformer_matches(folder: Path) -> bool:
    """Whether a model folder has a transformer that was trained on the tokens of its VQGAN."""
    return (folder / "gpt.safetensors").is_file() and transformer_mismatch(folder) is None


def transformer_mismatch(folder: Path) -> str | None:
    """Why the transformer was not trained on the tokens of the VQGAN beside it, so that it draws noise; or None."""
    record = load_record(folder)
    before, now = _section(record, DIGESTS), part_digests(folder)
    replaced = before and any(before.get(part) != digest for part, digest in now.items())
    vqgan = _section(_section(record, "stages"), "vqgan")
    trained_alone = _section(record, "settings").get("stage") == "vqgan" and not vqgan.get("tokens_kept")
    if replaced or trained_alone:
        return (
            "its transformer was not trained on the tokens of its VQGAN, so that it draws noise; train stage "
            "transformer from these weights, or copy the whole folder again if it was changed"
        )
    return None


def _section(record: dict[str, object], name: str) -> dict[str, object]:
    """A JSON object in a JSON object; empty if there is none."""
    return section if isinstance(section := record.get(name), dict) else {}


def folder_sha256(folder: Path) -> str:
    """SHA-256 of what `sha256sum config.yaml {clip,vqgan,gpt,bridge}.safetensors` prints in the folder."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in FILES if name != TRAINING]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def part_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the first SAMPLE numbers of each tensor in the codebook and in the transformer's last layer."""
    digests = {}
    for part, prefix in DIGESTED.items():
        path = folder / f"{part}.safetensors"
        if not path.is_file():
            continue
        digest = hashlib.sha256()
        for name, tensor in sorted(read_tensors(path).items()):
            if name.startswith(prefix):
                digest.update(tensor.flatten()[:SAMPLE].view(torch.uint8).numpy())
        digests[part] = digest.hexdigest()
    return digests


def load_discriminator(folder: Path) -> nn.Module | None:
    """The discriminator of an imported VQGAN, for fine-tuning; None if there is none. ModelFolderError if damaged."""
    path = folder / DISCRIMINATOR
    if not os.path.lexists(path):
        return None
    try:
        tensors = read_tensors(path)
        layers, channels = discriminator_layers(tensors), max(1, len(tensors["main.0.weight"]))
        tensors = read_part(on_meta(lambda: build_discriminator(channels, layers), path, "copy it again"), path)
    except (LookupError, TypeError, ModelFolderError) as error:
        raise ModelFolderError(
            f"{path}: is damaged or not a discriminator; copy it again, or remove it to train with a new one"
        ) from error
    network = build_discriminator(channels, layers)
    network.load_state_dict(tensors)
    return network


def load_part(network: nn.Module, path: Path) -> None:
    """Loads a network from a safetensors file; the errors of read_part."""
    network.load_state_dict(read_part(network, path))


def read_part(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file's tensors, memory-mapped. ModelFolderError unless names and shapes fit and all numbers are finite."""
    _check_file(path)
    wanted = network.state_dict()
    tensors = with_zero_rows(read_tensors(path), wanted)
    if problem := _mismatch(wanted, tensors):
        raise ModelFolderError(f"{path}: {problem}; it belongs to another {CONFIG} than the one beside it")
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ModelFolderError(f"{path}: {name} holds numbers that are not finite; copy it again, or train again")
    return tensors


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelFolderError(
            f"{path}: missing; copy the whole model folder again. To a folder without a CLIP, {MODULE} "
            "import clip adds one; without a transformer, train one (stage 2)"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped; ModelFolderError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path}: damaged ({error}); copy it again") from error


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is infinite or NaN. Checks the extremes only, which is ten times as fast as isfinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _mismatch(wanted: dict[str, Tensor], loaded: dict[str, Tensor]) -> str | None:
    """Why these tensors are not the wanted ones, or None."""
    for name in wanted:
        if name not in loaded:
            return f"has no tensor {name}"
        if wanted[name].shape != loaded[name].shape:
            return f"{name} has shape {tuple(loaded[name].shape)}, wanted is {tuple(wanted[name].shape)}"
        # Integers and complex numbers would lose digits, and torch cannot compute with 8-bit floats.
        floats = wanted[name].is_floating_point()
        if floats != loaded[name].is_floating_point() or (floats and loaded[name].element_size() < 2):
            return f"{name} has numbers of type {_type(loaded[name])}, wanted is {_type(wanted[name])}"
    extra = sorted(set(loaded) - set(wanted))
    return f"has a tensor that does not belong to this network, {extra[0]}" if extra else None


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_model_folder(folder: Path) -> None:
    """ValueError unless the folder is new, empty, or a model folder without other files, which may be replaced."""
    made_here = has_settings(folder / CONFIG, ("clip", "vqgan", "gpt"))
    check_replaceable(folder, "model", (*FILES, *TEXTS, DISCRIMINATOR), made_here)


def save_networks(networks: Networks, folder: str | Path, training: dict[str, object]) -> None:
    """Writes a model folder atomically, with float16 parameters; replaces an existing one."""
    check_model_folder(Path(folder))
    with atomic_folder(Path(folder)) as temporary:
        for part in PARTS:
            save_part(getattr(networks, part), temporary / f"{part}.safetensors")
        for name, text in networks.texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_description(temporary, networks.config, training)


def write_description(folder: Path, config: ModelConfig, training: dict[str, object]) -> None:
    """Writes config.yaml and training.json of a model folder, after its weights."""
    write_config(config, folder / CONFIG)
    training = {DIGESTS: part_digests(folder)} | training
    (folder / TRAINING).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def save_part(network: nn.Module, path: Path) -> None:
    """Writes a network's tensors atomically: parameters in float16, buffers in float32, since those may overflow."""
    remedy = "train again at a lower rate"
    write_part(without_zero_rows(narrowed(network, network.state_dict(), torch.float16, path.name, remedy)), path)


def narrowed(
    network: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype | None, file: Path | str, remedy: str
) -> dict[str, Tensor]:
    """The network's tensors, parameters in `dtype` unless it is None.

    ValueError with the file and the remedy for NaN and numbers out of range.
    """
    names, converted = dict(network.named_parameters()), {}
    for name, tensor in tensors.items():
        converted[name] = tensor.to(dtype) if dtype and name in names else tensor
        if not all_finite(converted[name]):
            raise ValueError(f"{file}: {name} holds numbers that {_type(converted[name])} cannot; {remedy}")
    return converted


def write_part(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file atomically. OSError if it cannot be written."""
    with atomic_file(path) as temporary:
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:
            reason = f"could not be written ({error}); make room, and start the same command again"
            raise OSError(f"{path}: {reason}") from error
