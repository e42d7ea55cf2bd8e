"""weights.py: weights tars."""

from __future__ import annotations

import base64
import os
import tarfile
from pathlib import Path

import pytest

from clip_gen.checkpoint import ModelFolderError
from clip_gen.weights import pack, resolve_weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def weights_tar(tiny_model_folder: Path, tmp_path: Path) -> Path:
    pack(tiny_model_folder, tmp_path / "weights.tar")
    return tmp_path / "weights.tar"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_packed_folder_comes_back_file_by_file(tiny_model_folder: Path, weights_tar: Path, cache: Path) -> None:
    with tarfile.open(weights_tar) as tar:
        assert set(tar.getnames()) == {path.name for path in tiny_model_folder.iterdir()}
    assert contents(resolve_weights(str(weights_tar))) == contents(tiny_model_folder)


def test_a_folder_is_itself(tiny_model_folder: Path) -> None:
    assert resolve_weights(str(tiny_model_folder)) == tiny_model_folder


def test_a_tar_is_unpacked_once_and_again_when_it_changes(weights_tar: Path, cache: Path) -> None:
    first = resolve_weights(str(weights_tar))
    assert resolve_weights(str(weights_tar)) == first
    os.utime(weights_tar, ns=(1, 1))
    assert resolve_weights(str(weights_tar)) != first


def test_a_data_url_holds_a_tar(tiny_model_folder: Path, weights_tar: Path, cache: Path) -> None:
    url = "data:application/x-tar;base64," + base64.b64encode(weights_tar.read_bytes()).decode()
    assert contents(resolve_weights(url)) == contents(tiny_model_folder)


def test_the_cache_keeps_the_newest_few(weights_tar: Path, cache: Path) -> None:
    for i in range(7):
        os.utime(weights_tar, ns=(i, i))
        newest = resolve_weights(str(weights_tar))
    assert len(list(cache.iterdir())) == 4
    assert newest.is_dir()


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ("/no/such/thing", "'/no/such/thing' is no model folder, no file and no http"),
        ("ftp://example.com/weights.tar", "is no model folder, no file and no http"),
        ("http://127.0.0.1:9/weights.tar", "http://127.0.0.1:9/weights.tar: cannot be read"),
        ("data:application/x-tar;base64,???", "not base64"),
        ("data:application/x-tar;base64,aGVsbG8=", "cannot be read as a weights tar"),
        (__file__, "cannot be read as a weights tar"),
    ],
)
def test_what_is_no_weights_is_a_sentence_and_leaves_nothing(weights: str, sentence: str, cache: Path) -> None:
    with pytest.raises(ModelFolderError, match=sentence):
        resolve_weights(weights)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("kept", [5_120, 50_000])  # between two files, and within one
def test_a_truncated_tar_leaves_nothing(weights_tar: Path, cache: Path, kept: int) -> None:
    weights_tar.write_bytes(weights_tar.read_bytes()[:kept])
    with pytest.raises(ModelFolderError, match=r"weights\.tar: (cannot be read as a weights tar|has no )"):
        resolve_weights(str(weights_tar))
    assert not list(cache.iterdir())


def test_a_hostile_tar_writes_nothing_outside_its_folder(tiny_model_folder: Path, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for file in tiny_model_folder.iterdir():
            if file.name != "training.json":
                tar.add(file, arcname=file.name)
        for name in ("../climbed", str(tmp_path / "absolute"), "sub/config.yaml"):
            tar.add(tiny_model_folder / "config.yaml", arcname=name)
        link = tarfile.TarInfo("training.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    unpacked = contents(resolve_weights(str(path)))
    assert unpacked == {name: data for name, data in contents(tiny_model_folder).items() if name != "training.json"}
    assert {file.name for file in tmp_path.iterdir()} == {"hostile.tar", "cache"}


def test_a_tar_without_a_model_is_named(tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(__file__, arcname="photo.jpg")
    with pytest.raises(ModelFolderError, match=r"photos\.tar: has no config\.yaml at its root"):
        resolve_weights(str(tmp_path / "photos.tar"))
    assert not list(cache.iterdir())
