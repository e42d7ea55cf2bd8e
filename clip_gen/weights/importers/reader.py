"""Reads the tensors of foreign checkpoint files without running code in them.

PyTorch runs the code in a TorchScript archive while it loads it. So an archive is loaded only if its SHA-256 is in a
list of the caller's.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._weights_only_unpickler import get_globals_in_pkl

from clip_gen.files import sha256_of
from clip_gen.weights.importers.state_dict import Checkpoint

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "params_ema")  # keys of the state dict: Lightning, HFAiLab, Real-ESRGAN
PREFIXES = ("module.", "_orig_mod.", "model.")  # added by DataParallel, torch.compile and Lightning
AVERAGES = "model_ema."  # prefix of moving averages, whose names are the parameters' without dots
COUNTERS = ("decay", "num_updates")  # among the averages, but not averages
AVERAGED = "n_averaged"  # a counter of torch's AveragedModel
# Discriminators are trained further from their raw weights; LPIPS has no averages.
NEVER_AVERAGED = ("loss.", "discriminator.")
MAX_SCRIPT_BYTES = 2 * 10**9  # OpenAI's largest has 1.3 GB
AGAIN = "download it again"

CONVERTIBLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def read_checkpoint(path: Path, inside: str = "", scripts: Collection[str] = ()) -> Checkpoint:
    """The tensors of a file of torch.save or safetensors, memory-mapped if possible.

    The tensors may be at the top level or under one of WRAPPERS. Prefixes of wrapper modules are removed, and moving
    averages replace the raw weights; both are logged.
    inside: if the file has tensors with this prefix, only those are returned. scripts: SHA-256 of the TorchScript
    archives that may be loaded. ValueError if the file cannot be used.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a checkpoint file")
    checkpoint = _without_prefixes(Checkpoint(path, _named_tensors(path, _content(path, scripts))))
    part = checkpoint.under(inside)
    if inside and part.tensors:
        log.info(f"{path}: takes {inside}* and leaves out {len(checkpoint.tensors) - len(part.tensors)} other tensors")
        checkpoint = part
    return _averaged(checkpoint)


def origin(path: Path) -> dict[str, object]:
    """The entry in training.json about a file that weights came from."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _content(path: Path, scripts: Collection[str]) -> object:
    """The content of the file, with unknown classes replaced by inert ones."""
    with path.open("rb") as file:
        head = file.read(512)
    if head and not re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        line = head.decode(errors="replace").strip().partition("\n")[0][:60]
        raise ValueError(
            f"{path}: is text that begins with {line!r}, not weights; download the file itself. The address may want a "
            "login or have changed; for a Git LFS pointer run git lfs pull"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for developers, not for users
            if head[5:9] == b"\0\0\0{":  # safetensors: end of the header's length, and the JSON header
                return load_file(path)
            # Hash and load the same bytes: the file may change meanwhile.
            script = path.read_bytes() if scripts and path.stat().st_size < MAX_SCRIPT_BYTES else b""
            if hashlib.sha256(script).hexdigest() in scripts:
                return torch.jit.load(io.BytesIO(script), map_location="cpu").state_dict()
            return _load_pickle(path, zipped=head.startswith(b"PK"))
    except Exception as error:  # damaged and hostile files raise errors of many types
        raise ValueError(f"{path}: {_reason(error)}") from error


def _load_pickle(path: Path, zipped: bool) -> object:
    """Loads what torch.save writes. Before torch 1.6 that was four pickles, of which the last is the content."""
    if zipped:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    else:
        with path.open("rb") as file:
            names = {name for _ in range(4) for name in get_globals_in_pkl(file)}
    # torch looks up its own allowed names first, so these keep their meaning. It can fill a real dict only.
    classes = [(OrderedDict if name.lower().endswith("dict") else _Inert, name) for name in names]
    with torch.serialization.safe_globals(classes):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)


class _Inert:
    """Replaces a class that a checkpoint names: takes all arguments and does nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _reason(error: Exception) -> str:
    """Why a file cannot be read, and what to do. torch's own messages address developers."""
    text = str(error)
    if "torchscript" in text.lower():
        return (
            "is a TorchScript archive, and PyTorch runs the code in such a file while loading it. Only the "
            "nine CLIP files of OpenAI are loaded, by their sha256 and as a CLIP, and this is none of them. If it "
            f"should be, {AGAIN}. Otherwise give a state dict. If you trust the file, this command makes one: "
            "python -c \"import torch; model = torch.jit.load('FILE', map_location='cpu'); "
            "torch.save(model.state_dict(), 'weights.pt')\""
        )
    if isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL|persistent_load|reduce|Can only", text):
        refused = re.search(r"GLOBAL (\S+)", text)
        what = refused[1] if refused else "Python objects"
        return (
            f"asks for {what}, not for tensors alone, and is not loaded: such a pickle can run any code. If you trust "
            "the file, save its state dict where the code that wrote it is installed, with "
            "torch.load('FILE', map_location='cpu', weights_only=False) and torch.save, and give that"
        )
    return (
        "is damaged, larger than the memory, or not a file of torch.save or safetensors; "
        f"{AGAIN}, or save its state dict with torch.save"
    )


def _named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict in the content of a file; ValueError if there is none."""
    entries = content if isinstance(content, dict) else {}
    wrapper = next((name for name in WRAPPERS if isinstance(entries.get(name), dict)), None)
    if wrapper:
        others = ", ".join(str(name) for name in entries if name != wrapper) or "nothing"
        log.info(f"{path}: takes the tensors under {wrapper} and leaves out {others}")
        content = entries[wrapper]
    remedy = f"give a state dict: tensors by name, at the top or under {' or '.join(WRAPPERS)}"
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds no tensors by name; {remedy}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: its entry {str(name)[:100]!r} is not a tensor with a name; {remedy}")
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in CONVERTIBLE:
            raise ValueError(
                f"{path}: {name[:100]} is stored in a form that cannot be converted ({tensor.dtype}, {tensor.layout}, "
                f"{tensor.device.type}); give the checkpoint in float32, float16 or bfloat16"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def _without_prefixes(checkpoint: Checkpoint) -> Checkpoint:
    """Removes the prefixes that wrapper modules add to all names."""
    cut = checkpoint.without(AVERAGED)
    while cut.tensors and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in cut.tensors)), None)):
        cut = cut.under(prefix)
    if cut.prefix == checkpoint.prefix:
        return checkpoint
    log.info(f"{checkpoint.path}: the prefix {cut.prefix} of every key is left out")
    return cut


def _averaged(checkpoint: Checkpoint) -> Checkpoint:
    """Replaces raw weights by their moving averages, if the file has them."""
    averages = {n: t for n, t in checkpoint.under(AVERAGES).tensors.items() if n not in COUNTERS}
    if not averages:
        return checkpoint
    raw = _without_prefixes(checkpoint.without(AVERAGES))
    cut = raw.prefix.removeprefix(checkpoint.prefix)  # the averages' names may contain it
    names = {(prefix + name).replace(".", ""): name for prefix in ("", cut) for name in raw.tensors}
    tensors, used = dict(raw.tensors), 0
    for theirs, tensor in averages.items():
        name = names.get(theirs.removeprefix("module.").replace(".", ""))
        if name is None:
            raise ValueError(
                f"{checkpoint.path}: {AVERAGES}{theirs} is the average of no key in the file; give the whole checkpoint"
            )
        if not name.startswith(NEVER_AVERAGED):
            tensors[name], used = tensor, used + 1
    log.info(f"{checkpoint.path}: takes the moving averages ({AVERAGES}*) of {used} tensors, not their raw weights")
    return Checkpoint(checkpoint.path, tensors, raw.prefix)
