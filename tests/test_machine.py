"""machine.py: settings of the process are as they were, whatever happened meanwhile, and memory is given back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from clip_gen.cog_training import KEEP_MEMORY
from clip_gen.machine import at_work, spare_cores, tensor_float32

CUDA = torch.device("cuda")


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_a_gpu_may_round_for_as_long_as_it_is_allowed_and_no_longer() -> None:
    before = allowed()
    with tensor_float32(CUDA, True):
        assert allowed() == (True, True)
        with tensor_float32(CUDA, False):
            assert allowed() == (False, False)
        assert allowed() == (True, True)
    with pytest.raises(KeyError), tensor_float32(CUDA, True):
        raise KeyError
    assert allowed() == before


def test_a_cpu_is_left_alone() -> None:
    before = allowed()
    with tensor_float32(torch.device("cpu"), not before[0]):
        assert allowed() == before


def test_networks_are_back_on_the_cpu_after_an_error_too() -> None:
    network = nn.Linear(2, 2)
    with at_work(network) as device:
        assert network.weight.device.type == device.type
    with pytest.raises(KeyError), at_work(network):
        raise KeyError
    assert network.weight.device.type == "cpu"


class Moved(nn.Linear):
    """Where there is no GPU: elsewhere its numbers are of another type, so that both ways make new tensors."""

    def to(self, device: torch.device) -> nn.Module:
        return super().to(torch.float64)

    def cpu(self) -> nn.Module:
        return super().to(torch.float32)


def test_networks_that_worked_where_nothing_is_learnt_can_be_trained_afterwards() -> None:
    network = Moved(2, 2).requires_grad_(False)
    with torch.inference_mode(), at_work(network):
        assert network.weight.dtype == torch.float64
    network.requires_grad_(True)
    network(torch.ones(1, 2)).sum().backward()
    assert network.weight.grad.sum() == 4


def test_one_core_is_left_to_the_one_who_asks() -> None:
    assert 1 <= spare_cores() <= 16


def test_memory_kept_for_later_is_given_back_before_processes_that_prepare_samples_get_it() -> None:
    code = """
from pathlib import Path
import torch
from torch.utils.data import Dataset
from clip_gen.training.dataset import prepared

def held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 10**6

class Held(Dataset):  # by a process that prepares samples
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return held() - began


began = held()
used = [torch.ones(2**18) for _ in range(300)]  # 315 MB
used = used[-1]  # which keeps the heap from shrinking by itself
kept = held()
(prepares,) = prepared(Held())
print(kept - began, held() - began, int(prepares))
"""
    environment = os.environ | KEEP_MEMORY
    kept, *left = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
    assert int(kept) > 300
    assert max(map(int, left)) < 30
