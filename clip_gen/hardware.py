"""What the machine has: CPU cores, threads for torch, the device, its number formats and its free memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent ends
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def choose_device(device: str = "auto") -> torch.device:
    """The device for "cpu", "cuda" or "auto", which is the GPU if there is one. ValueError for any other."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device is "{device}"; give "auto", "cpu" or "cuda"')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device is "cuda", but torch sees none here; give "cpu" or "auto"')
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def own_share() -> tuple[int, int]:
    """This process's number and how many share the work, if torchrun started it; else (0, 1).

    The process sees one GPU from then on, so call this before CUDA is used.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if len(names) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(os.environ["LOCAL_RANK"]) % len(names)]
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The type of the transformer's matrices. None: $CLIP_GEN_DTYPE, or auto if that is not set.

    auto: bfloat16 where the hardware multiplies it, float16 on other x86 CPUs, else float32. ValueError for an unknown
    type, and for one that this device does not support.
    """
    dtype = dtype or os.environ.get("CLIP_GEN_DTYPE") or "auto"
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f'dtype is "{dtype}"; give "auto", "float32", "bfloat16" or "float16"')
    has_float16 = device.type == "cpu" and supports_float16()
    if dtype == "float16" and not has_float16:
        raise ValueError('dtype is "float16", which needs an x86 CPU with AVX2; give "auto"')
    if dtype == "auto":
        dtype = "bfloat16" if prefers_bfloat16(device) else "float16" if has_float16 else "float32"
    return getattr(torch, dtype)


def prefers_bfloat16(device: torch.device, training: bool = False) -> bool:
    """Whether products are faster in bfloat16 than in float32: on a GPU that supports it, and on a CPU with AMX.

    A CPU with AVX512_BF16 counts in training only, and in decoding large images: their large products are faster there
    (208 GFLOP/s on one core of an EPYC 9004, against 78), but the small ones of sampling are not.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or (training and capabilities.get("avx512_bf16")))


def supports_float16() -> bool:
    """Whether this CPU can multiply with float16 weights (networks/float16_linear.py): FBGEMM needs x86 with AVX2."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")  # torch lists FBGEMM on ARM too
    return x86 and "fbgemm" in torch.backends.quantized.supported_engines


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; for a CPU, within the limits of this process's cgroups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = [int(lines["MemAvailable"].split()[0]) * 1024]
    for folder in _cgroups():
        with suppress(OSError, ValueError):  # no such file, or no limit ("max")
            most, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = sum(int(kinds.get(name, 0)) for name in ("inactive_file", "active_file"))  # freed on demand
            available.append(most - used + cached)
    return max(0, min(available))


def cpus() -> int:
    """How many CPUs this process can use: those it may run on, limited by its cgroups' quotas. At least 1.

    A quota of 1.5 CPUs counts as 1, because two threads would both wait for the next period.
    """
    limits = [len(os.sched_getaffinity(0))]
    for folder in _cgroups():
        with suppress(OSError, ValueError):  # no such file, or no limit ("max")
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            limits.append(quota // period)
    return max(1, min(limits))


def _cgroups() -> list[Path]:
    """Folders of this process's cgroup (version 2) and its parents.

    In a container the path in /proc may be the host's. Then only the top folder exists. A sandbox such as gVisor may
    have neither.
    """
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []
    own = [line[3:] for line in lines if line.startswith("0::")]
    inside = Path("".join(own).strip("/"))
    return [CGROUPS / group for group in (inside, *inside.parents)]


def spare_cores() -> int:
    """How many processes may load data while this one computes: all cores but one, from 1 to 16."""
    return min(16, max(1, cpus() - 1))


def set_threads(count: int) -> int:
    """Sets how many threads torch uses for work of the calling thread, and of no other; returns how many it used.

    torch.set_num_threads alone also changes the default for threads that use torch for the first time later.
    """
    with _thread_lock():
        before = torch.get_num_threads()
        if before != count:
            default = _in_new_thread(torch.get_num_threads)
            torch.set_num_threads(count)
            _in_new_thread(partial(torch.set_num_threads, default))
    return before


def _in_new_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    # Not an executor, which takes no work any more when the main thread has ended.
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses the calling thread alone.

    A thread keeps the OpenMP threads that it started. With more of them than CPUs, GNU's OpenMP puts all to sleep
    between two operations, and a batcher that uses several threads takes 2.5 times as long.
    """
    before = set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


# By process: a forked child has no thread that would release its parent's lock.
_thread_locks: dict[int, threading.Lock] = {}


def _thread_lock() -> threading.Lock:
    return _thread_locks.setdefault(os.getpid(), threading.Lock())


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it ends, by whatever means."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def release_memory() -> None:
    """Returns freed memory, which malloc keeps (serving.train_process.TRAIN_ENVIRONMENT), to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def on_device(*networks: nn.Module) -> Iterator[torch.device]:
    """Moves networks to the GPU, if there is one, and back to the CPU at the end; yields the device."""
    device = choose_device()
    with torch.inference_mode(False):  # parameters moved in inference mode could not be trained afterwards
        for network in networks:
            network.to(device)
    try:
        yield device
    finally:
        with torch.inference_mode(False):
            for network in networks:
                network.cpu()


@contextmanager
def tensor_float32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether a GPU may use TF32 in float32 products: mantissas of ten bits, several times as fast."""
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn] if device.type == "cuda" else []
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a tensor did not fit into memory: torch has a class for this error on a GPU only."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
