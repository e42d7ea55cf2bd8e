"""Data loaders with worker processes: as many as there are spare cores and room in shared memory."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from functools import cache

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from clip_gen.hardware import release_memory, spare_cores

log = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"  # where workers put their batches; containers have little of it
USABLE = 0.8  # of the free shared memory; NCCL and other processes need some too
BATCHES_PER_WORKER = 2  # made ahead, DataLoader's default
BATCHES_IN_USE = 2  # by the process that trains: the current one and the next
MAX_ADDRESS = 107  # bytes in the path of a Unix socket
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent ends


def loader_with_workers(samples: Dataset, sharing: int = 1, **options: object) -> DataLoader:
    """A DataLoader with as many workers as spare cores and shared memory allow.

    sharing: training processes on this machine that each have such a loader. The workers are forked from this process,
    which returns freed memory to the system first: each would otherwise hold a copy of it.
    """
    wanted = max(1, spare_cores() // sharing)
    workers = _workers_that_fit(DataLoader(samples, **options), wanted, sharing)
    release_memory()
    if workers:
        _make_socket_folder()
    return Loader(samples, num_workers=workers, worker_init_fn=_start_worker, **options)


def _make_socket_folder() -> None:
    """Creates the folder of the sockets through which workers pass batches; it is removed when this process ends.

    It is in TMPDIR, or in shared memory where that path is too long for the address of a socket: no worker could pass a
    batch, and the training would hang.
    """
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > MAX_ADDRESS - len("/pymp-12345678/listener-12345678"):
        tempfile.tempdir = SHARED_MEMORY
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before


class Loader(DataLoader):
    """Blocks signals while it starts its workers, until they have set their handlers."""

    def __iter__(self) -> Iterator:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Makes a worker end with its parent, and ignore signals that a terminal or `timeout` sends to the whole group: the
    parent may need the worker's batch to reach a checkpoint. SIGTERM from the parent itself still ends the worker.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _workers_that_fit(loader: DataLoader, wanted: int, sharing: int) -> int:
    """At most `wanted` worker processes, as many as fit into shared memory; warns when they are fewer, or none."""
    size, free = sharing * _batch_bytes(loader), _free_bytes()
    count = min(wanted, max(0, int(USABLE * free / max(1, size) - BATCHES_IN_USE) // BATCHES_PER_WORKER))
    if count < wanted and not getattr(rank_zero_only, "rank", 0):  # without Lightning there is one process
        _warn_of_fewer(count, wanted, size * (BATCHES_PER_WORKER * wanted + BATCHES_IN_USE))
    return count


@cache  # warns once for loaders that need the same
def _warn_of_fewer(count: int, wanted: int, need: int) -> None:
    log.warning(
        "%s has %.0f MB free, too little for %d processes that load pictures (%.0f MB): %s; a larger one makes loading "
        "faster (docker run --shm-size=%dg)",
        *(SHARED_MEMORY, _free_bytes() / 1e6, wanted, need / 1e6),
        f"{count} will load them" if count else "the training process loads them itself",
        need / USABLE // 2**30 + 1,
    )


def _free_bytes() -> int:
    """Bytes that can be written to shared memory now; 0 without it."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _batch_bytes(loader: DataLoader) -> int:
    """The size of a batch's tensors, estimated from its first sample."""
    indices = next(iter(loader.batch_sampler or ()), None)
    if not indices:
        return 0
    parts = tree_leaves(loader.collate_fn([loader.dataset[indices[0]]]))
    return len(indices) * sum(part.nbytes for part in parts if isinstance(part, Tensor))
