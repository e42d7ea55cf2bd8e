"""weights/tarball.py: weights tars."""

from __future__ import annotations

import base64
import errno
import gzip
import os
import pwd
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest
from model_files import web_server

from clip_gen.files import ROOT
from clip_gen.weights import tarball as module
from clip_gen.weights.model_folder import ModelFolderError
from clip_gen.weights.tarball import pack, resolve_weights


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


def test_a_tar_has_the_texts_of_its_folder(tiny_model_folder: Path, tmp_path: Path, cache: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    for name in ("vocabulary.txt", "LICENSES.md"):
        (folder / name).write_text(f"This is {name}.")
    pack(folder, tmp_path / "weights.tar")
    assert contents(resolve_weights(str(tmp_path / "weights.tar"))) == contents(folder)


def test_an_unpacked_tar_has_the_files_of_its_folder(tiny_model_folder: Path, weights_tar: Path, cache: Path) -> None:
    with tarfile.open(weights_tar) as tar:
        assert set(tar.getnames()) == {path.name for path in tiny_model_folder.iterdir()}
    assert contents(resolve_weights(str(weights_tar))) == contents(tiny_model_folder)


def test_a_tar_has_the_licences_of_its_folder_and_a_lone_file_of_them_is_no_model(
    tiny_model_folder: Path, tmp_path: Path, cache: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    (folder / "LICENSES.md").write_text("by Ada")
    pack(folder, tmp_path / "weights.tar")
    assert contents(resolve_weights(tmp_path / "weights.tar")) == contents(folder)
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(folder / "LICENSES.md", "LICENSES.md")
        for path in tiny_model_folder.iterdir():
            tar.add(path, f"inside/{path.name}")
    assert contents(resolve_weights(tmp_path / "other.tar")) == contents(tiny_model_folder)


PACKING = """
import sys, time
from pathlib import Path
from clip_gen.files import atomic_file
with atomic_file(Path(sys.argv[1])) as temporary:
    Path(temporary).write_bytes(b"half")
    print(temporary, flush=True)
    time.sleep(60)
"""


def test_incomplete_folders_of_killed_processes_are_removed(tiny_model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PACKING, str(tmp_path / "weights.tar")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        temporary = Path(process.stdout.readline().strip())
        age(temporary.parent, 100)
        pack(tiny_model_folder, tmp_path / "weights.tar")
        assert temporary.is_file()  # another process is writing it
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    pack(tiny_model_folder, tmp_path / "weights.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.tar"]


def test_a_model_folder_is_used_in_place(tiny_model_folder: Path) -> None:
    assert resolve_weights(str(tiny_model_folder)) == tiny_model_folder


def test_the_folder_of_a_training_may_be_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "trained" / "model")
    assert resolve_weights(str(tmp_path / "trained")) == tmp_path / "trained" / "model"


def test_a_tar_is_unpacked_once_and_again_when_it_changes(weights_tar: Path, cache: Path) -> None:
    first = resolve_weights(str(weights_tar))
    assert resolve_weights(str(weights_tar)) == first
    os.utime(weights_tar, ns=(1, 1))
    assert resolve_weights(str(weights_tar)) != first


@pytest.mark.parametrize("form", ["data:application/x-tar;base64,", "DATA:;BASE64,"])
def test_a_data_url_may_contain_a_tar(tiny_model_folder: Path, weights_tar: Path, cache: Path, form: str) -> None:
    url = form + base64.b64encode(weights_tar.read_bytes()).decode()
    assert contents(resolve_weights(url)) == contents(tiny_model_folder)


def test_a_data_url_may_be_percent_encoded(tiny_model_folder: Path, weights_tar: Path, cache: Path) -> None:
    data = gzip.compress(weights_tar.read_bytes())
    assert contents(resolve_weights("data:," + quote_from_bytes(data))) == contents(tiny_model_folder)


def write_zip(folder: Path, path: Path, inside: str, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in folder.iterdir():
            archive.write(file, inside + file.name)
    return path


def write_tar(folder: Path, path: Path, inside: str) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=inside)
    return path


@pytest.mark.parametrize("inside", ["mine", "./mine", "trained/model", "."])
def test_the_model_may_be_in_a_folder_of_the_tar(
    tiny_model_folder: Path, tmp_path: Path, cache: Path, inside: str
) -> None:
    path = write_tar(tiny_model_folder, tmp_path / "weights.tar", inside)
    assert contents(resolve_weights(str(path))) == contents(tiny_model_folder)


@pytest.mark.parametrize("inside", ["", "mine/", "a\\b\\"])
def test_a_zip_of_a_model_folder_is_accepted_like_a_tar(
    tiny_model_folder: Path, tmp_path: Path, cache: Path, inside: str
) -> None:
    path = write_zip(tiny_model_folder, tmp_path / "model.zip", inside)
    assert contents(resolve_weights(path)) == contents(tiny_model_folder)
    with web_server(tmp_path) as address:
        assert contents(resolve_weights(f"{address}/model.zip")) == contents(tiny_model_folder)


def test_parts_of_a_model_elsewhere_in_a_tar_are_ignored(tiny_model_folder: Path, tmp_path: Path, cache: Path) -> None:
    """Like the folder of a training."""
    shutil.copytree(tiny_model_folder, tmp_path / "trained" / "model")
    (tmp_path / "trained" / "work" / "gpt").mkdir(parents=True)
    (tmp_path / "trained" / "work" / "gpt" / "gpt.safetensors").write_bytes(b"half-trained")
    path = write_tar(tmp_path / "trained", tmp_path / "all.tar", "trained")
    assert contents(resolve_weights(path)) == contents(tiny_model_folder)


def test_an_archive_of_two_models_is_refused(tiny_model_folder: Path, tmp_path: Path, cache: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(tiny_model_folder, tmp_path / "both" / name)
    path = write_tar(tmp_path / "both", tmp_path / "both.tar", "both")
    with pytest.raises(ModelFolderError, match=r"both\.tar: holds several models, both/a and both/b; pack one of them"):
        resolve_weights(path)
    assert not folders(cache)


def test_a_zip_that_unpacks_without_limit_is_refused(tiny_model_folder: Path, tmp_path: Path, cache: Path) -> None:
    path = write_zip(tiny_model_folder, tmp_path / "model.zip", "", zipfile.ZIP_LZMA)
    with pytest.raises(ModelFolderError, match=r"model\.zip: a file in it is compressed in a way that is not read"):
        resolve_weights(path)
    assert not folders(cache)


def test_a_zip_over_the_size_limit_is_refused(
    tiny_model_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tiny_model_folder, tmp_path / "model.zip", "")
    monkeypatch.setattr(module, "LIMITS", replace(module.LIMITS, max_bytes=path.stat().st_size + 1000))
    with pytest.raises(ModelFolderError, match=r"model\.zip: holds more than"):
        resolve_weights(path)
    assert not folders(cache)


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*") if path.name != ".lock"]


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("name", ["photo.jpg", "gpt.safetensors"])
def test_a_tar_over_the_size_limit_is_refused_whatever_its_files(
    tmp_path: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMITS", replace(module.LIMITS, max_bytes=2**20))
    (tmp_path / "big").write_bytes(bytes(2**20 + 1))
    with tarfile.open(tmp_path / "big.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "big", arcname=name)
    with pytest.raises(ModelFolderError, match=r"big\.tar\.gz: .*holds more than"):
        resolve_weights(str(tmp_path / "big.tar.gz"))


def test_a_tar_of_thousands_of_empty_files_is_refused(tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "many.tar.gz", "w:gz") as tar:
        for i in range(5000):
            tar.addfile(tarfile.TarInfo(str(i)))
    with pytest.raises(ModelFolderError, match="holds more than 4,096 files"):
        resolve_weights(str(tmp_path / "many.tar.gz"))


def test_a_full_disk_is_named_in_the_error(weights_tar: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*files: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(ModelFolderError, match=r"\(No space left on device\); make room, or set CLIP_GEN_CACHE"):
        resolve_weights(str(weights_tar))
    assert not folders(cache)


def test_a_url_is_unpacked_once_and_again_when_its_file_changes(weights_tar: Path, tmp_path: Path, cache: Path) -> None:
    (site := tmp_path / "site").mkdir()
    shutil.copy(weights_tar, site)
    with web_server(site) as address:
        url = f"{address}/weights.tar"
        first = resolve_weights(url)
        assert resolve_weights(url) == first
        age(site / "weights.tar", 60)  # of the same length, like retrained weights
        assert resolve_weights(url) != first


def test_a_url_without_etag_or_date_is_downloaded_each_time(
    weights_tar: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_server(weights_tar.parent, hidden=("Last-Modified",)) as address:
        url = f"{address}/weights.tar"
        assert resolve_weights(url) != resolve_weights(url)


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No CLIP_GEN_CACHE, and a HOME that cannot be written to. Returns the temporary folder, which is empty."""
    (tmp_path / "home").write_text("a file")
    (temporary := tmp_path / "tmp").mkdir()
    monkeypatch.delenv("CLIP_GEN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


def test_without_a_writable_home_the_cache_is_a_private_temporary_folder(weights_tar: Path, no_home: Path) -> None:
    assert no_home in resolve_weights(str(weights_tar)).parents
    assert [path.stat().st_mode & 0o777 for path in no_home.iterdir()] == [0o700]


def test_a_user_without_a_home_has_a_private_cache_too(
    weights_tar: Path, no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert no_home in resolve_weights(str(weights_tar)).parents


def test_a_cache_that_others_can_write_to_is_refused(weights_tar: Path, no_home: Path) -> None:
    (no_home / f"clip-gen-{os.getuid()}").mkdir()
    (no_home / f"clip-gen-{os.getuid()}").chmod(0o777)
    with pytest.raises(ModelFolderError, match="set CLIP_GEN_CACHE"):
        resolve_weights(str(weights_tar))


def test_a_named_cache_that_cannot_be_written_to_is_refused(weights_tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE", __file__)
    with pytest.raises(
        ModelFolderError, match=r"cannot be used for the weights cache \(Not a directory\); set CLIP_GEN_CACHE"
    ):
        resolve_weights(str(weights_tar))


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ("/no/such/thing", "/no/such/thing: no such file or folder; give a model folder"),
        ("", "the name of the weights is empty; give a model folder"),
        ("ftp://example.com/weights.tar", "no such file or folder"),
        ("http://127.0.0.1:9/weights.tar", "http://127.0.0.1:9/weights.tar: cannot be opened (Connection refused)"),
        ("http://[bad/x", "Invalid IPv6 URL"),
        ("http://", "no host given"),
        ("http://exämple.com/weights.tar", "a URL is ASCII"),
        ("http://127.0.0.1:9/" + "x y" * 2000, "URL can't contain control characters"),
        ("data:application/x-tar;base64,???", "cannot be opened (Only base64 data is allowed)"),
        ("data:application/x-tar;base64,ä", "cannot be opened (Only base64 data is allowed)"),
        ("data:application/x-tar;base64,aGVsbG8=", "is a text file, not an archive"),
        ("data:,x", "is a text file, not an archive"),
        ("data:x", "is an empty file, not an archive"),
        ("long" * 1250, "File name too long"),
        ("\0", "no such file or folder"),
        (__file__, "is a text file, not an archive"),
    ],
    ids=lambda text: text[:30],
)
def test_files_that_are_not_weights_are_refused_and_leave_nothing(weights: str, sentence: str, cache: Path) -> None:
    with pytest.raises(ModelFolderError) as error:
        resolve_weights(weights)
    assert sentence in str(error.value)
    assert weights[:101] not in str(error.value) or len(weights) <= 100
    assert len(str(error.value)) < 350
    assert not folders(cache)


@pytest.mark.parametrize("kept", [5_120, 50_000])  # between two files, and within one
def test_a_truncated_tar_is_refused_and_leaves_nothing(weights_tar: Path, cache: Path, kept: int) -> None:
    weights_tar.write_bytes(weights_tar.read_bytes()[:kept])
    with pytest.raises(
        ModelFolderError, match=r"weights\.tar: is damaged, cut off or no archive \(.*\); download or copy it"
    ):
        resolve_weights(str(weights_tar))
    assert not folders(cache)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<!DOCTYPE html><html>Log in", "is a web page, not an archive"),
        (b"\n<html>", "is a web page, not an archive"),
        (b"", "is an empty file, not an archive"),
        (b"PK\3\4 and no zip", "is damaged, cut off or no archive (File is not a zip file)"),
        (bytes(10_240), "holds no weights, nothing in it is called config.yaml"),
    ],
)
def test_the_error_names_what_the_file_is(tmp_path: Path, cache: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "weights.tar").write_bytes(content)
    with pytest.raises(ModelFolderError) as error:
        resolve_weights(tmp_path / "weights.tar")
    assert f"weights.tar: {sentence}" in str(error.value)
    assert not folders(cache)


def test_a_folder_without_a_model_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"holds no model, its config\.yaml is missing"):
        resolve_weights(tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(ModelFolderError, match=r"holds a training that has not ended; start the same command again"):
        resolve_weights(tmp_path)


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


def test_a_tar_without_a_complete_model_is_an_error(tiny_model_folder: Path, tmp_path: Path, cache: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(__file__, arcname="photo.jpg")
    with pytest.raises(ModelFolderError, match=r"photos\.tar: holds no weights, nothing in it is called config\.yaml"):
        resolve_weights(str(tmp_path / "photos.tar"))
    with tarfile.open(tmp_path / "half.tar", "w") as tar:
        tar.add(tiny_model_folder / "config.yaml", arcname="config.yaml")
    with pytest.raises(ModelFolderError, match=r"half\.tar: has no clip\.safetensors; pack the whole model folder"):
        resolve_weights(str(tmp_path / "half.tar"))
    assert not folders(cache)


def empty_files(path: Path, names: Iterable[str]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return path


def test_names_in_a_tar_cannot_fill_the_memory(tmp_path: Path, cache: Path) -> None:
    path = empty_files(tmp_path / "long.tar.gz", (f"{i}/" + "a/" * 200_000 + "config.yaml" for i in range(3)))
    with pytest.raises(ModelFolderError, match=r"long\.tar\.gz: holds no weights"):
        resolve_weights(path)
    assert not folders(cache)


def test_a_tar_may_have_a_name_that_is_not_utf8(weights_tar: Path, tiny_model_folder: Path, cache: Path) -> None:
    named = weights_tar.rename(weights_tar.with_name(os.fsdecode(b"gewichte-\xfc.tar")))
    assert contents(resolve_weights(named)) == contents(tiny_model_folder)
