"""checkpoint.py: the model folder on disk."""

from __future__ import annotations

import base64
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_networks
from safetensors.torch import load_file, save_file

from clip_gen.checkpoint import PARTS, ModelFolderError, load_networks, pack, resolve_weights, save_networks


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def test_a_saved_model_is_loaded_whole(folder: Path) -> None:
    saved, loaded = tiny_networks(), load_networks(folder)
    assert loaded.config == TINY
    for part in PARTS:
        for name, tensor in getattr(saved, part).state_dict().items():
            found = getattr(loaded, part).state_dict()[name]
            assert found.dtype == tensor.dtype, name
            assert torch.allclose(found, tensor, rtol=1e-3, atol=1e-6), name


def test_parameters_are_float16_on_disk_and_buffers_keep_their_type(folder: Path) -> None:
    tensors = load_file(folder / "vqgan.safetensors")
    assert tensors["decoder.conv_in.weight"].dtype == torch.float16
    assert tensors["quantizer.quantize._codebook.embed"].dtype == torch.float32


def test_loaded_networks_are_frozen_and_in_eval_mode(folder: Path) -> None:
    networks = load_networks(folder)
    for part in PARTS:
        assert not any(p.requires_grad for p in getattr(networks, part).parameters())
        assert not any(module.training for module in getattr(networks, part).modules())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"nowhere: no such model folder"):
        load_networks(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", *(f"{part}.safetensors" for part in PARTS)])
def test_a_missing_file_is_named_with_the_remedy(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelFolderError, match=rf"{name}: missing.*[Cc]opy the whole"):
        load_networks(folder)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.999])
def test_a_truncated_file_is_named_with_the_remedy(folder: Path, part: str, kept: float) -> None:
    path = folder / f"{part}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    with pytest.raises(ModelFolderError, match=rf"{part}.safetensors: damaged.*copy it again"):
        load_networks(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    path = folder / "gpt.safetensors"
    tensors = load_file(path)
    tensors["head.weight"] = tensors["head.weight"][:-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(
        ModelFolderError, match=r"gpt.safetensors: head.weight has shape \(31, 16\), wanted is \(32, 16\)"
    ):
        load_networks(folder)


def test_missing_and_extra_tensors_are_named(folder: Path) -> None:
    path = folder / "gpt.safetensors"
    tensors = load_file(path)
    moved = {**tensors, "headless": torch.zeros(1)}
    save_file(moved, path)
    with pytest.raises(ModelFolderError, match="nothing asks for, headless"):
        load_networks(folder)
    del moved["head.weight"], moved["headless"]
    save_file(moved, path)
    with pytest.raises(ModelFolderError, match=r"no tensor head\.weight"):
        load_networks(folder)


@pytest.mark.parametrize(
    ("old", "new"), [("n_layer: 2", "n_layer: two"), ("n_layer", "layers"), ("block_size: 16", "block_size: 9")]
)
def test_a_config_that_makes_no_sense_is_named(folder: Path, old: str, new: str) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ModelFolderError, match=r"config\.yaml"):
        load_networks(folder)


def test_a_save_that_fails_leaves_the_old_file_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors: dict, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("clip_gen.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_networks(tiny_networks(1), folder, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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
