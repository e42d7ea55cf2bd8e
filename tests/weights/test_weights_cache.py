"""weights/cache.py: which folders stay and which are removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_gen.files import ROOT
from clip_gen.pipeline import ClipGen
from clip_gen.weights.cache import Cache, CacheError
from clip_gen.weights.model_folder import ModelFolderError, load_config
from clip_gen.weights.tarball import open_weights, pack

SIZE = 100_000
# Another process, which uses the folder of one key, unpacks another and prints its path.
OTHER = f"""
import time
from clip_gen.weights.cache import Cache
cache = Cache()
used = cache.find("old")
def unpack(folder):
    (folder / "half").write_bytes(bytes({SIZE}))
    print(folder, flush=True)
    time.sleep(60)
cache.add("other", unpack)
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(SIZE))


def limited(max_bytes: float) -> Cache:
    cache = Cache()
    cache.max_bytes = max_bytes
    return cache


def add(cache: Cache, *keys: str) -> list[Path]:
    """Folders that nobody uses, least recently used first."""
    paths = []
    for i, key in enumerate(keys):
        folder = cache.add(key, fill)
        folder.close()
        os.utime(folder.path, (time.time() - 1000 + i,) * 2)
        paths.append(folder.path)
    return paths


def test_the_least_recently_used_folders_are_removed() -> None:
    cache = limited(4.5 * SIZE)
    a, b, c, d = add(cache, "a", "b", "c", "d")
    cache.find("a").close()
    assert cache.make_room(2 * SIZE)
    assert [path.is_dir() for path in (a, b, c, d)] == [True, False, False, True]
    assert not list(cache.folder.glob(".unpacking-*"))


def test_folders_are_removed_until_the_disk_has_enough_free() -> None:
    cache = Cache()
    cache.free_bytes = shutil.disk_usage("/tmp").free * 2
    paths = add(cache, "a", "b")
    assert not cache.make_room(0)
    assert not any(path.exists() for path in paths)


def test_a_folder_in_use_stays_until_it_is_closed() -> None:
    cache = limited(0)
    used = cache.add("a", fill)
    again = Cache().find("a")
    for folder in (used, again):
        assert not cache.make_room(SIZE)
        assert used.path.is_dir()
        folder.close()
    cache.make_room(SIZE)
    assert not used.path.exists()


def test_a_loaded_model_keeps_its_folder_until_it_is_deleted(tiny_model_folder: Path, tmp_path: Path) -> None:
    pack(tiny_model_folder, tmp_path / "weights.tar")
    model, cache = ClipGen.load(tmp_path / "weights.tar", "cpu"), limited(0)
    folder = model.source.path
    cache.make_room(0)
    assert folder.is_dir()
    del model
    cache.make_room(0)
    assert not folder.exists()


def test_another_process_keeps_its_folders_until_it_is_killed() -> None:
    cache = limited(0)
    old, idle = add(cache, "old", "idle")
    process = subprocess.Popen([sys.executable, "-c", OTHER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        unpacking = Path(process.stdout.readline().strip())
        cache.make_room(0)
        assert [path.exists() for path in (old, idle, unpacking)] == [True, False, True]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    cache.make_room(0)
    assert [path for path in cache.folder.iterdir() if path.name != ".lock"] == []


def test_a_folder_that_fails_to_unpack_is_removed() -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise ValueError("broken")

    cache = Cache()
    with pytest.raises(ValueError, match="broken"):
        cache.add("a", fail)
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]


def test_weights_of_requests_are_refused_without_room(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        pack(tiny_model_folder, tmp_path / f"{name}.tar")
    own = open_weights(tmp_path / "one.tar")
    monkeypatch.setenv("CLIP_GEN_CACHE_GB", "0.001")
    with pytest.raises(CacheError, match="has no room for these weights beside those in use"):
        open_weights(tmp_path / "two.tar", needs_room=True)
    assert [path for path in own.path.parent.iterdir() if path.name != ".lock"] == [own.path]
    assert open_weights(tmp_path / "two.tar").path.is_dir()  # named by the operator: not refused


def test_eight_threads_with_many_tars_keep_their_folders(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE_GB", "0")
    pack(tiny_model_folder, first := tmp_path / "first.tar")
    tars = [Path(shutil.copy(first, tmp_path / f"{i}.tar")) for i in range(16)]

    def load(i: int) -> None:
        for path in (tars[i], tars[i + 8], first, tars[i]):
            folder = open_weights(path)
            load_config(folder.path)
            assert len(list(folder.path.iterdir())) == 6

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(8)))


@pytest.mark.parametrize("value", ["-1", "much", "nan", "inf"])
def test_a_setting_that_is_not_a_size_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE_FREE_GB", value)
    with pytest.raises(ModelFolderError, match=f"CLIP_GEN_CACHE_FREE_GB is {value}; give a number of gigabytes"):
        Cache()
