"""How many processes may load batches: each keeps some in shared memory, of which containers have little."""

from __future__ import annotations

import logging
import os
from functools import cache

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"  # where Linux has it
USABLE = 0.8  # of what is free; NCCL and other processes need some too
AHEAD = 2  # batches that a worker makes ahead, as DataLoader has it by default
IN_HAND = 2  # that the process which loads them has: one in use, and the next


def workers_that_fit(loader: DataLoader, wanted: int, sharing: int) -> int:
    """Of `wanted` worker processes as many as shared memory suffices for, 0 where it does for none; says so.

    sharing: processes of this machine that load such batches at the same time, each with as many workers.
    """
    size, free = sharing * batch_bytes(loader), free_bytes()
    count = min(wanted, max(0, int(USABLE * free / max(1, size) - IN_HAND) // AHEAD))
    if count < wanted and not getattr(rank_zero_only, "rank", 0):  # without Lightning there is one process
        _say_fewer(count, wanted, size * (AHEAD * wanted + IN_HAND), free)
    return count


@cache  # once, although several loaders have the same need
def _say_fewer(count: int, wanted: int, need: int, free: int) -> None:
    log.warning(
        "%s has %.0f MB free, too little for %d processes that load pictures (%.0f MB): %s; a larger one makes loading "
        "faster (docker run --shm-size=%dg)",
        *(SHARED_MEMORY, free / 1e6, wanted, need / 1e6),
        f"{count} will load them" if count else "the training process loads them itself",
        need / USABLE // 2**30 + 1,
    )


def free_bytes() -> int:
    """What can be written to shared memory now; 0 where there is none."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def batch_bytes(loader: DataLoader) -> int:
    """The size of a batch's tensors, by its first sample."""
    indices = next(iter(loader.batch_sampler or ()), None)
    if not indices:
        return 0
    parts = tree_leaves(loader.collate_fn([loader.dataset[indices[0]]]))
    return len(indices) * sum(part.nbytes for part in parts if isinstance(part, Tensor))
