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
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch._weights_only_unpickler import get_globals_in_pkl

from clip_gen.files import is_web_page, sha256_of
from clip_gen.weights.importers.state_dict import Checkpoint

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model")  # keys of the state dict in checkpoints of Lightning and HFAiLab
PREFIXES = ("module.", "_orig_mod.", "model.")  # added by DataParallel, torch.compile and Lightning
AVERAGES = "model_ema."  # prefix of moving averages, whose names are the parameters' without dots
COUNTERS = ("decay", "num_updates")  # among the averages, but not averages
AVERAGED = "n_averaged"  # a counter of torch's AveragedModel
# Discriminators are trained further from their raw weights; LPIPS has no averages.
NEVER_AVERAGED = ("loss.", "discriminator.")
MAX_SCRIPT_BYTES = 2 * 10**9  # OpenAI's largest has 1.3 GB
AGAIN = "download it again"

# What the restricted unpickler raises on damaged and hostile files.
UNREADABLE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, OSError, EOFError, RuntimeError, ValueError),
    *(TypeError, LookupError, AttributeError, AssertionError, UnicodeError, OverflowError, MemoryError),
)


def read_checkpoint(path: Path, inside: str = "", scripts: Collection[str] = ()) -> Checkpoint:
    """The tensors of a file of torch.save or safetensors, memory-mapped if possible.

    The tensors may be at the top level or under one of WRAPPERS. Prefixes of wrapper modules are removed, and moving
    averages replace the raw weights; both are logged.
    inside: if the file has tensors with this prefix, only those are returned. scripts: SHA-256 of the TorchScript
    archives that may be loaded. ValueError if the file cannot be used.
    """
    check_file(path)
    checkpoint = _without_prefixes(Checkpoint(path, _named_tensors(path, _content(path, scripts))))
    part = checkpoint.under(inside) if inside else Checkpoint(path, {})
    if part.tensors:
        log.info(f"{path}: takes {inside}* and leaves out {len(checkpoint.tensors) - len(part.tensors)} other tensors")
        checkpoint = part
    return _averaged(checkpoint)


def check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the checkpoint file in it")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a checkpoint")


def origin(path: Path) -> dict[str, object]:
    """The entry in training.json about a file that weights came from."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _content(path: Path, scripts: Collection[str]) -> object:
    """The content of the file, with unknown classes replaced by inert ones."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[5:9] == b"\0\0\0{":  # safetensors: end of the header's length, and the JSON header
        load = load_file
    elif head.startswith(b"PK"):
        load = _load_zip
        if _checked_zip(path):
            return _load_script(path, scripts)
    else:
        _check_head(path, head)
        load = _load_legacy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for developers, not for users
            return load(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: {_reason(error)}") from error


def _check_head(path: Path, head: bytes) -> None:
    """ValueError if the first bytes show that the file is not a checkpoint."""
    if not head:
        raise ValueError(f"{path}: is empty; {AGAIN}")
    if is_web_page(head):
        raise ValueError(
            f"{path}: is a web page, not weights; look at the page in a browser (it may ask for a login or say that "
            "the address has changed) and download the file itself"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer, not weights; run git lfs pull, or download the file itself")
    if not re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        line = head.decode(errors="replace").strip().partition("\n")[0][:60]
        raise ValueError(f'{path}: is text ("{line}"), not weights; download the file itself')
    if head[257:262] == b"ustar":
        raise ValueError(f"{path}: is a tar archive; unpack it and give the checkpoint in it")


def _checked_zip(path: Path) -> bool:
    """Whether a zip archive is TorchScript; ValueError if it is not a checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # zipfile raises NotImplementedError for a version of the format that it does not read.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: is cut off or damaged; {AGAIN}") from error
    if not any(name.endswith("/data.pkl") for name in names):
        holds = f"it holds {names[0][:60]!r}" if names else "it is empty"
        raise ValueError(f"{path}: is a zip archive, but not a checkpoint ({holds}); give the checkpoint itself")
    return any(name.endswith("/constants.pkl") for name in names)


def _load_script(path: Path, scripts: Collection[str]) -> dict[str, Tensor]:
    # Hash and load the same bytes: the file may change meanwhile.
    content = path.read_bytes() if path.stat().st_size < MAX_SCRIPT_BYTES else b""
    if hashlib.sha256(content).hexdigest() not in scripts:
        raise ValueError(
            f"{path}: is a TorchScript archive, and PyTorch runs the code in such a file while loading it. Only the "
            "nine CLIP files of OpenAI are loaded, by their sha256 and as a CLIP, and this is none of them. If it "
            f"should be, {AGAIN}. Otherwise give a state dict. If you trust the file, this command makes one: "
            "python -c \"import torch; model = torch.jit.load('FILE', map_location='cpu'); "
            "torch.save(model.state_dict(), 'weights.pt')\""
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict()
    except UNREADABLE as error:
        raise ValueError(f"{path}: PyTorch {torch.__version__} cannot load this TorchScript archive") from error


def _load_zip(path: Path) -> object:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)


def _load_legacy(path: Path) -> object:
    """Loads the format of torch before 1.6: four pickles, of which the last is the content, and the numbers."""
    with path.open("rb") as file:
        names = {name for _ in range(4) for name in get_globals_in_pkl(file)}
    # torch looks up its own allowed names first, so these keep their meaning.
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
        return torch.load(str(path), map_location="cpu", weights_only=True)


def _stand_in(name: str) -> type:
    """An inert class to replace one that a checkpoint names: accepts all arguments and does nothing."""
    # The unpickler fails unless it can fill a real dict.
    mapping = name.lower().endswith("dict")

    class StandIn:
        def __new__(cls, *args: object) -> object:
            return OrderedDict() if mapping else object.__new__(cls)

        def __init__(self, *args: object):
            pass

        def __setstate__(self, state: object) -> None:
            pass

    return StandIn


def _reason(error: Exception) -> str:
    """Why a file cannot be read, and what to do. torch's own messages address developers."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return f"asks for more memory than this machine has; it is damaged ({AGAIN}), or needs a larger machine"
    refused = re.search(r"GLOBAL (\S+)", str(error))
    pickled = isinstance(error, pickle.UnpicklingError)
    if pickled and (refused or re.search(r"persistent_load|reduce|Can only", str(error))):
        what = refused[1] if refused else "Python objects"
        return (
            f"asks for {what}, not for tensors alone, and is not loaded: such a pickle can run any code. If you trust "
            "the file, save its state dict where the code that wrote it is installed, with "
            "torch.load('FILE', map_location='cpu', weights_only=False) and torch.save, and give that"
        )
    return f"is damaged, or not a file of torch.save or safetensors; {AGAIN}, or save its state dict with torch.save"


def _named_tensors(path: Path, content: object) -> dict[str, Tensor]:
    """The state dict in the content of a file; ValueError if there is none."""
    if isinstance(content, dict):
        groups = [name for name, value in content.items() if isinstance(value, dict)]
        wrapper = next((name for name in WRAPPERS if name in groups), None)
        others = [str(name) for name in groups if name != wrapper and _all_tensors(content[name])]
        if wrapper and others:
            log.info(f"{path}: takes the tensors under {wrapper} and leaves out those under {', '.join(others)}")
        content = content[wrapper] if wrapper else content
    remedy = f"give a state dict: tensors by name, at the top or under {' or '.join(WRAPPERS)}"
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds no tensors by name; {remedy}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: its entry {str(name)[:100]!r} is not a tensor with a name; {remedy}")
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or (tensor.is_floating_point() and tensor.element_size() < 2) or tensor.is_complex():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path}: {name[:100]} is stored in a form that cannot be converted ({kind}, {tensor.layout}, "
                f"{tensor.device.type}); give the checkpoint in float32, float16 or bfloat16"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def _all_tensors(group: dict) -> bool:
    return bool(group) and all(isinstance(value, Tensor) for value in group.values())


def _without_prefixes(checkpoint: Checkpoint) -> Checkpoint:
    """Removes the prefixes that wrapper modules add to all names."""
    cut = checkpoint.without(AVERAGED)
    while cut.tensors:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in cut.tensors)), None)
        if prefix is None:
            break
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
