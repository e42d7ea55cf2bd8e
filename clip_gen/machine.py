"""What the machine has: cores to spare, and a GPU to work on."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def spare_cores() -> int:
    """How many processes may prepare samples while this one works: 1 on 2 cores, never more than 16."""
    return min(16, max(1, len(os.sched_getaffinity(0)) - 1))


def give_back_memory() -> None:
    """Returns to the system what malloc holds on to once it is freed (cog_training.KEEP_MEMORY)."""
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
