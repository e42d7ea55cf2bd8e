"""weights/pull.py: a server's files to a model folder that predicts, or one clear error and no folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import clip
import pytest
import torch
from bad_server import BadServer, bad_server
from importer_files import VIT, clip_state, hfailab_files, taming_files
from safetensors.torch import load_file
from torchvision.models import VGG16_Weights
from upscaler_files import upscaler_bytes, upscaler_state

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.files import ROOT
from clip_gen.weights import default_model, download, pull
from clip_gen.weights import url as url_module
from clip_gen.weights.model_folder import load_config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small versions of the files of both publishers."""
    folder = hfailab_files(tmp_path_factory.mktemp("published"))
    torch.save(clip_state(VIT), folder / "clip.pt")
    names = {"gpt.pt": "gpt_coco.pt", "vqgan.pt": "vqgan_coco.pt", "clip.pt": "ViT-B-32.pt"}
    return {theirs: (folder / ours).read_bytes() for ours, theirs in names.items()}


@pytest.fixture(autouse=True)
def _small(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The published addresses, with the sizes and SHA-256 of the small files."""
    clip = replace(pull.CLIPS["ViT-B/32"], sha256=hashlib.sha256(files["ViT-B-32.pt"]).hexdigest())
    monkeypatch.setitem(pull.CLIPS, "ViT-B/32", clip)
    monkeypatch.setitem(pull.COCO, "clip", clip)
    monkeypatch.setattr(pull, "COCO_BYTES", 10**8)
    monkeypatch.setattr(download, "BACK_OFF_SECONDS", 0.001)
    monkeypatch.setattr(url_module, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(pull, "CHECKPOINTS", Path("checkpoints"))
    monkeypatch.chdir(tmp_path)


def test_pulled_models_are_saved_where_predictions_find_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert default_model.COCO == pull.CHECKPOINTS / "coco" == ROOT / "checkpoints" / "coco"
    monkeypatch.delenv("CLIP_GEN_UPSCALER", raising=False)
    assert default_model.upscaler_weights().parent == ROOT / "checkpoints" / "upscaler"


def test_pull_coco_makes_a_folder_that_predicts_and_leaves_nothing_else(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with bad_server(files, ["truncate", 500, "drop", "stall"]) as server:
        assert main(["pull", "coco", "--mirror", server.address]) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["coco"]
    assert len(ClipGen.load("checkpoints/coco", "cpu").generate("a cat", 2, 1, seed=0).images) == 1
    record = json.loads((tmp_path / "checkpoints" / "coco" / "training.json").read_text())["imported"]
    for part, name in (("gpt", "gpt_coco.pt"), ("vqgan", "vqgan_coco.pt"), ("clip", "ViT-B-32.pt")):
        assert record[part]["sha256"] == hashlib.sha256(files[name]).hexdigest()
        assert record[part]["bytes"] == len(files[name])


def test_pull_clip_by_its_published_name(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with bad_server(files) as server:
        monkeypatch.setenv("CLIP_GEN_MIRROR", f"{server.address}/some/folder/")
        assert main(["pull", "clip", "ViT-B/32"]) == 0
    assert server.requests == [("/some/folder/ViT-B-32.pt", None)]
    assert load_config(Path("checkpoints/clip-vit-b-32")).clip == VIT


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ([404], "the server answers 404"),
        ([500] * 6, "cannot be downloaded"),
        (["well", "well", "wrong"], "its sha256 is"),
        (["wrong"], "vqgan_coco.pt: is damaged, larger than the memory, or not a file of torch.save"),
    ],
)
def test_a_pull_that_fails_leaves_no_model_folder_and_the_next_one_succeeds(
    plan: list[str | int], sentence: str, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bad_server(files, plan) as server:
        assert main(["pull", "coco", "--mirror", server.address]) == 1
        assert sentence in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "checkpoints" / "coco").exists()
        assert main(["pull", "coco", "--mirror", server.address]) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["coco"]


@pytest.mark.parametrize("name", ["gpt_coco.pt", "ViT-B-32.pt"])
def test_a_web_page_instead_of_weights_is_reported_and_removed(
    name: str, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bad_server(files | {name: b"\n<!DOCTYPE html><title>Sign in</title>"}) as server:
        assert main(["pull", "coco", "--mirror", server.address]) == 1
        assert f"/{name}: the server sends a web page; open the address" in capsys.readouterr().err
        assert len([path for path, _ in server.requests if path == f"/{name}"]) == 1
        server.files = files
        assert main(["pull", "coco", "--mirror", server.address]) == 0


def test_a_pull_that_fails_leaves_the_model_that_was_there(files: dict[str, bytes], tmp_path: Path) -> None:
    with bad_server(files) as server:
        assert main(["pull", "coco", "--mirror", server.address]) == 0
        before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "coco").iterdir()}
        server.plan = ["well", "wrong"]
        assert main(["pull", "coco", "--mirror", server.address]) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "coco").iterdir()} == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["coco", "--mirror", "elsewhere"], 'mirror is "elsewhere"; give an address that begins with http'),
        (["clip", "ViT-B/64"], 'the name of the CLIP is "ViT-B/64"; give one of RN50, '),
        (["clip"], 'the name of the CLIP is ""; give one of RN50, '),
        (["coco", "ViT-B/32"], "coco takes no name"),
        (["lpips", "vgg"], "lpips takes no name"),
        (["vqgan", "f16"], 'the name of the VQGAN is "f16"; give one of imagenet-f16-1024, imagenet-f16-16384, '),
    ],
)
def test_a_name_that_is_not_published_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_too_little_disk_space_is_reported_before_any_request(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pull, "COCO_BYTES", 10**18)
    with bad_server(files) as server:
        assert main(["pull", "coco", "--mirror", server.address]) == 1
    assert server.requests == []
    assert "wanted are 1000000000.0; make room" in capsys.readouterr().err


def test_a_second_pull_of_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / ".pulling-coco").mkdir(parents=True)
    with (tmp_path / "checkpoints" / ".pulling-coco" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["pull", "coco"]) == 1
    assert "is being pulled already" in capsys.readouterr().err


@pytest.fixture
def lpips_server(lpips_files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    """Has small versions of the two files of LPIPS, with their SHA-256."""
    files = {path.name: path.read_bytes() for path in lpips_files.iterdir()}
    vgg, linear = (hashlib.sha256(files[pull.LPIPS[part].name]).hexdigest() for part in ("vgg", "linear"))
    monkeypatch.setitem(pull.LPIPS, "vgg", replace(pull.LPIPS["vgg"], sha256=vgg[:8]))
    monkeypatch.setitem(pull.LPIPS, "linear", replace(pull.LPIPS["linear"], sha256=linear))
    monkeypatch.setattr(pull, "LPIPS_BYTES", 10**8)
    with bad_server(files) as server:
        yield server


def test_pull_lpips_makes_a_folder_with_its_origin_and_can_be_repeated(lpips_server: BadServer, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "lpips"
    for _ in range(2):
        assert main(["pull", "lpips", "--mirror", lpips_server.address]) == 0
        assert [path.name for path in folder.parent.iterdir()] == ["lpips"]
        assert sorted(path.name for path in folder.iterdir()) == ["lpips.json", "lpips.safetensors"]
    tensors = load_file(folder / "lpips.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(tensors) == 13 * 2 + 5
    assert sum(tensor.numel() for tensor in tensors.values()) == 14_714_688 + 1472  # VGG-16's features; five layers
    record = json.loads((folder / "lpips.json").read_text())["imported"]
    for part, file in pull.LPIPS.items():
        content = lpips_server.files[file.name]
        assert record[part]["sha256"] == hashlib.sha256(content).hexdigest()
        assert record[part]["bytes"] == len(content)
        assert record[part]["url"] == file.url


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("vgg", {"sha256": "397923af"}, "wanted is 397923af"),
        ("linear", {"sha256": "0" * 64}, "wanted is 0000"),
    ],
)
def test_a_file_with_another_sha256_is_refused(
    part: str,
    change: dict[str, str],
    sentence: str,
    lpips_server: BadServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(pull.LPIPS, part, replace(pull.LPIPS[part], **change))
    assert main(["pull", "lpips", "--mirror", lpips_server.address]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "lpips").exists()


def test_a_vgg_is_downloaded_again_only_if_its_sha256_differs(lpips_server: BadServer, tmp_path: Path) -> None:
    folder, name = tmp_path / "checkpoints" / ".pulling-lpips", pull.LPIPS["vgg"].name
    for content in (lpips_server.files[name], b"other bytes"):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        assert main(["pull", "lpips", "--mirror", lpips_server.address]) == 0
    assert [path for path, _ in lpips_server.requests] == ["/vgg.pth", f"/{name}", "/vgg.pth"]


def test_pull_vqgan_by_its_name_resumes_and_a_clip_can_be_added(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "VQGAN_BYTES", 10**8)
    theirs = taming_files(tmp_path)
    names = {"vqgan_imagenet_f16_1024.yaml": theirs["model.yaml"], "vqgan_imagenet_f16_1024.ckpt": theirs["last.ckpt"]}
    with bad_server(files | names, ["well", "drop", 500]) as server:
        monkeypatch.setenv("CLIP_GEN_MIRROR", server.address)
        assert main(["pull", "vqgan", "imagenet-f16-1024"]) == 0
        assert any(requested_range for _, requested_range in server.requests)  # resumed
        folder = tmp_path / "checkpoints" / "vqgan-imagenet-f16-1024"
        assert load_config(folder).vqgan.ch_mult == (1, 1, 2, 2, 4)
        assert {path.name for path in folder.glob("*.safetensors")} == {
            "vqgan.safetensors",
            "discriminator.safetensors",
        }
        record = json.loads((folder / "training.json").read_text())["imported"]["vqgan"]
        assert record["sha256"] == hashlib.sha256(theirs["last.ckpt"]).hexdigest()
        assert main(["pull", "clip", "ViT-B/32", "--out", str(folder)]) == 0
    assert {"clip.safetensors", "vqgan.safetensors"} <= {path.name for path in folder.iterdir()}


@pytest.fixture
def upscaler_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    """Has a small version of the upscaler's file, with its SHA-256."""
    published = pull.UPSCALER
    with bad_server({published.name: upscaler_bytes()}) as server:
        sha256 = hashlib.sha256(server.files[published.name]).hexdigest()
        monkeypatch.setattr(pull, "UPSCALER", replace(published, sha256=sha256))
        yield server


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pull_upscaler_makes_a_folder_with_its_origin_and_resumes(
    dtype: str, upscaler_server: BadServer, tmp_path: Path
) -> None:
    upscaler_server.plan = ["drop", 500, "truncate"]
    assert main(["pull", "upscaler", "--mirror", upscaler_server.address, "--dtype", dtype]) == 0
    [folder] = (tmp_path / "checkpoints").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["upscaler.json", "upscaler.safetensors"]
    wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in upscaler_state().items()}
    tensors = load_file(folder / "upscaler.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())
    record = json.loads((folder / "upscaler.json").read_text())["imported"]["upscaler"]
    assert (record["sha256"], record["url"]) == (pull.UPSCALER.sha256, pull.UPSCALER.url)
    assert any(requested_range for _, requested_range in upscaler_server.requests)  # resumed


def test_an_upscaler_with_another_sha256_is_refused(
    upscaler_server: BadServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upscaler_server.plan = ["wrong"]
    assert main(["pull", "upscaler", "--mirror", upscaler_server.address]) == 1
    assert "its sha256 is" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "upscaler").exists()


def test_lpips_and_a_model_do_not_replace_each_other(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "lpips", "--out", str(tiny_model_folder)]) == 1
    assert "and is no LPIPS folder of this program; name a new or an empty one" in capsys.readouterr().err
    (tmp_path / "lpips.json").write_text("{}")
    assert main(["pull", "coco", "--out", str(tmp_path)]) == 1
    assert "holds lpips.json and is no model folder" in capsys.readouterr().err


def test_every_clip_has_the_address_and_sha256_that_openais_package_has() -> None:
    assert {name: file.url for name, file in pull.CLIPS.items()} == clip.clip._MODELS
    for name, file in pull.CLIPS.items():
        assert name == "ViT-B/32" or f"/{file.sha256}/" in file.url  # here it is the SHA-256 of a small file


def test_checkpoints_readme_lists_every_file_with_its_sha256() -> None:
    readme = (ROOT / "checkpoints" / "README.md").read_text()
    vqgans = [file for files in pull.VQGANS.values() for file in files.values()]
    for file in [*pull.CLIPS.values(), *pull.COCO.values(), *pull.LPIPS.values(), pull.UPSCALER, *vqgans]:
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{file.name}` |"))
        known = file.url.split("/")[-2] if file in pull.CLIPS.values() else file.sha256 or "not published"
        assert known in row
        assert f"| {file.licence} |" in row
    for file in [*pull.CLIPS.values(), pull.VQGANS["imagenet-f16-16384"]["checkpoint"]]:
        assert f"| {file.size:,} |" in readme


def test_the_plan_of_a_download_has_the_files_name_size_and_licence() -> None:
    assert str(pull.CLIPS["ViT-B/32"]) == "ViT-B-32.pt (354 MB, MIT)"
    assert str(pull.VQGANS["imagenet-f16-1024"]["checkpoint"]) == "vqgan_imagenet_f16_1024.ckpt (958 MB, MIT)"


def test_the_vgg_is_torchvisions_with_the_sha256_in_its_name() -> None:
    file = pull.LPIPS["vgg"]
    assert file.url == VGG16_Weights.IMAGENET1K_V1.url
    assert file.name == f"vgg16-{file.sha256}.pth"
