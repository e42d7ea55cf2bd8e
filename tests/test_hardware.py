"""hardware.py: settings of the process are restored, and memory is released."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from clip_gen.hardware import available_memory, cpus, on_device, one_thread, set_threads, spare_cores, tensor_float32
from clip_gen.serving.train_process import TRAIN_ENVIRONMENT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_enabled_inside_the_context_only() -> None:
    before = allowed()
    with tensor_float32(CUDA, True):
        assert allowed() == (True, True)
        with tensor_float32(CUDA, False):
            assert allowed() == (False, False)
        assert allowed() == (True, True)
    with pytest.raises(KeyError), tensor_float32(CUDA, True):
        raise KeyError
    assert allowed() == before


def test_on_a_cpu_tf32_settings_are_unchanged() -> None:
    before = allowed()
    with tensor_float32(torch.device("cpu"), not before[0]):
        assert allowed() == before


def test_networks_return_to_the_cpu_after_an_error() -> None:
    network = nn.Linear(2, 2)
    with on_device(network) as device:
        assert network.weight.device.type == device.type
    with pytest.raises(KeyError), on_device(network):
        raise KeyError
    assert network.weight.device.type == "cpu"


class Moved(nn.Linear):
    """Stands for a move to a GPU: changes the type, so that moving makes new tensors."""

    def to(self, device: torch.device) -> nn.Module:
        return super().to(torch.float64)

    def cpu(self) -> nn.Module:
        return super().to(torch.float32)


def test_networks_moved_in_inference_mode_can_be_trained_afterwards() -> None:
    network = Moved(2, 2).requires_grad_(False)
    with torch.inference_mode(), on_device(network):
        assert network.weight.dtype == torch.float64
    network.requires_grad_(True)
    network(torch.ones(1, 2)).sum().backward()
    assert network.weight.grad.sum() == 4


@pytest.mark.parametrize(
    ("own", "files", "count"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/", {}, 8),
        # A service has the limits of the groups around it too.
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000", "a/b/cpu.max": "600000 100000"}, 3),
        ("0::/host/path/of/container", {"cpu.max": "400000 100000"}, 4),
        ("4:memory:/x\n1:cpu:/\n0::/", {"cpu.max": "400000 100000"}, 4),
    ],
)
def test_cpus_are_limited_by_the_quotas_of_cgroups(
    own: str, files: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("clip_gen.hardware.CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("clip_gen.hardware.OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpus() == count
    assert spare_cores() == max(1, count - 1)


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.hardware.CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("clip_gen.hardware.OWN_CGROUPS", tmp_path / "own")
    assert cpus() == len(os.sched_getaffinity(0))
    assert available_memory(torch.device("cpu")) > 0


def test_cpus_are_limited_by_the_affinity_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cpus() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5})
    assert cpus() == spare_cores() == 1


def test_set_threads_changes_the_calling_thread_only() -> None:
    def in_new_thread(work: Callable[[], int]) -> int:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(work).result()

    def set_and_get() -> int:
        set_threads(3)
        with one_thread():
            assert torch.get_num_threads() == 1
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert in_new_thread(set_and_get) == 3
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == before


def test_concurrent_threads_all_get_their_setting_back() -> None:
    def set_and_get(delay: float) -> int:
        time.sleep(delay)
        with one_thread():
            pass
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(20):
            with ThreadPoolExecutor(16) as threads:
                assert set(threads.map(set_and_get, [number / 8000 for number in range(16)])) == {3}
    finally:
        torch.set_num_threads(before)


def test_freed_memory_is_released_before_data_loading_processes_start() -> None:
    code = """
from pathlib import Path
import torch
from torch.utils.data import Dataset
from clip_gen.training.datasets import loader_with_workers

def held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 10**6

class Held(Dataset):  # in a worker process
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return held() - began


began = held()
used = [torch.ones(2**18) for _ in range(300)]  # 315 MB
used = used[-1]  # which keeps the heap from shrinking by itself
kept = held()
(prepares,) = loader_with_workers(Held())
print(kept - began, held() - began, int(prepares))
"""
    environment = os.environ | TRAIN_ENVIRONMENT
    kept, *left = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
    assert int(kept) > 300
    assert max(map(int, left)) < 30


def test_available_memory_is_the_containers_and_counts_file_cache_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_gen.hardware.CGROUPS", tmp_path)
    assert available_memory(CPU) > 1e8
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4800000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\nfile 2800000\ninactive_file 1500000\nactive_file 1300000\n")
    assert available_memory(CPU) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(CPU) > 1e8
