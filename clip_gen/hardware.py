"""What the machine has: CPUs, threads for torch, and a GPU to work on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpus() -> int:
    """How many CPUs this process can keep busy: those it may run on, and no more than its cgroup's quota pays for. At
    least 1; a quota of 1.5 CPUs counts as 1, because two threads would both wait for the next period.
    """
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), _cpu_quota())))


def _cpu_quota() -> float:
    """The least quota of this process's cgroups and of those around them, in CPUs; infinite without a limit."""
    quotas = [math.inf]
    for folder in _cpu_cgroups():
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            quotas.append(quota / period)
        with contextlib.suppress(OSError, ValueError):  # cgroups v1, where -1 is no limit
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            quotas.append(quota / period if quota > 0 else math.inf)
    return min(quotas)


def _cpu_cgroups() -> Iterator[Path]:
    """Folders of the cgroups that limit CPU time. In a container the path in /proc may be the host's, and only the
    folder at the top is there.
    """
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, inside = CGROUPS / "cpu" if controllers else CGROUPS, Path(path.strip("/"))
        yield from (top / group for group in (inside, *inside.parents))


def spare_cores() -> int:
    """How many processes may prepare samples while this one works: 1 on 2 cores, never more than 16."""
    return min(16, max(1, cpus() - 1))


def get_threads() -> int:
    """How many threads torch uses for work of the calling thread. The lock is for a thread's first use of torch, which
    would otherwise find the number that set_threads gives to another thread.
    """
    with _setting_threads:
        return torch.get_num_threads()


def set_threads(count: int) -> None:
    """How many threads torch uses for work of the calling thread. Other threads keep their number.

    torch.set_num_threads alone also sets it for every thread that uses torch for the first time later.
    """
    if get_threads() == count:
        return
    with _setting_threads, ThreadPoolExecutor(1) as new_thread:
        usual = new_thread.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        new_thread.submit(torch.set_num_threads, usual).result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch works in the calling thread alone.

    A thread that works on several keeps helpers for good. With more helpers than processors, GNU's OpenMP puts all of
    them to sleep between two operations, and a batcher that works on several threads takes two and a half times as
    long.
    """
    before = get_threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


def _new_lock() -> None:
    """A forked child has no thread that would release the lock."""
    global _setting_threads
    _setting_threads = threading.Lock()


_new_lock()
os.register_at_fork(after_in_child=_new_lock)


def give_back_memory() -> None:
    """Returns to the system what malloc holds on to once it is freed (serving.train_process.KEEP_MEMORY)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


@contextmanager
def at_work(*networks: nn.Module) -> Iterator[torch.device]:
    """Networks on a GPU for as long as they are used, where there is one; yields the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode(False):  # what is moved in there could not be trained afterwards
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
    """Whether a GPU may round the factors of float32 products to the ten bits of TF32, several times as fast."""
    if device.type != "cuda":
        yield
        return
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = allowed
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value
