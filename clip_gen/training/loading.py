"""Data loaders with worker processes."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from clip_gen.hardware import release_memory, spare_cores

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent ends


def loader_with_workers(
    samples: Dataset, sharing: int = 1, collate_fn: Callable | None = None, **options: object
) -> DataLoader:
    """A DataLoader with a worker process for each spare core.

    sharing: training processes on this machine that each have such a loader. The workers are forked from this process,
    which returns freed memory to the system first: each would otherwise hold a copy of it.
    """

    def to_arrays(samples_of_batch: list) -> object:
        return tree_map_only(Tensor, Tensor.numpy, (collate_fn or stack)(samples_of_batch))

    release_memory()
    workers = max(1, spare_cores() // sharing)
    return Loader(samples, num_workers=workers, collate_fn=to_arrays, worker_init_fn=_start_worker, **options)


def stack(samples: list) -> object:
    """Joins arrays, or tuples of arrays, to a batch. Torch's default_collate would do it in shared memory."""
    if isinstance(samples[0], tuple):
        return tuple(np.stack(parts) for parts in zip(*samples, strict=True))
    return np.stack(samples)


class Loader(DataLoader):
    """Loads batches of tensors. Its workers send them as arrays, through pipes: tensors would need shared memory, of
    which containers have little, and sockets in TMPDIR.
    """

    def __iter__(self) -> Iterator:
        # Workers inherit the blocked signals: one that a terminal or `timeout` sends to the whole group must not end
        # them, since this process may need their batches to reach a checkpoint.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return (tree_map_only(np.ndarray, torch.from_numpy, batch) for batch in batches)


def _start_worker(worker: int) -> None:
    """Makes a worker end with its parent, and when the parent itself sends SIGTERM."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
