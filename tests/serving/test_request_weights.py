"""request_weights.py: which weights a request may name, and the messages."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from model_files import web_server
from public_web import CERTIFICATE, PRIVATE, PUBLIC, public_web, serving

from clip_gen.serving.request_weights import (
    MAX_DOWNLOADS,
    REFUSALS,
    BusyError,
    RefusedWeightsError,
    RequestRules,
    fetched_base,
)
from clip_gen.weights.cache import CacheError
from clip_gen.weights.model_folder import ModelFolderError
from clip_gen.weights.tarball import pack

HTTPS = RequestRules("https", public_web())


@pytest.fixture(autouse=True)
def _environment_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tar(tiny_model_folder: Path, tmp_path: Path) -> Path:
    pack(tiny_model_folder, tmp_path / "weights.tar")
    return tmp_path / "weights.tar"


def data_url(tar: Path) -> str:
    return f"data:application/x-tar;base64,{base64.b64encode(tar.read_bytes()).decode()}"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_weights_on_a_public_server_and_in_a_data_url_are_allowed(tiny_model_folder: Path, tar: Path) -> None:
    with serving(PUBLIC, {"/weights.tar": tar.read_bytes()}) as server:
        folder = HTTPS.open(f"https://weights.example:{server.server_port}/weights.tar")
    assert names(folder.path) == names(HTTPS.open(data_url(tar)).path) == names(tiny_model_folder)


def test_all_refusals_have_the_same_message_and_the_log_has_the_reason(
    tiny_model_folder: Path, tar: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"/weights.tar": tar.read_bytes(), "/page": b"<html>a router", "/text": b"x" * 20_000}
    with serving(PRIVATE, files, tls=False) as inside, serving(PUBLIC, {**files, "/to": ""}) as outside:
        inner, outer = f"http://127.0.0.1:{inside.server_port}", f"https://weights.example:{outside.server_port}"
        outside.files["/to"] = f"{inner}/weights.tar"
        refused = [
            *(f"{inner}/{name}" for name in ("weights.tar", "page", "absent")),
            *("http://127.0.0.1:9/", "https://127.0.0.1:9/", f"https://127.0.0.1:{inside.server_port}/"),
            *("https://no-such-name.invalid/", "https://[bad/", "ftp://weights.example/", "file:///etc/passwd"),
            *(f"{outer}/to", f"{outer}/absent", f"{outer}/page", f"{outer}/text", "data:,x", "data:x"),
            *("/etc/passwd", "/etc/shadow", "/no/such/file", "/etc", str(tiny_model_folder), str(tar), "~", ""),
        ]
        for weights in refused:
            caplog.clear()
            with pytest.raises(RefusedWeightsError) as error:
                HTTPS.open(weights)
            assert str(error.value) == REFUSALS["https"], weights
            assert error.value.__cause__ is None
            assert weights in caplog.text
        assert inside.connections == 0
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_setting_none_opens_nothing(tar: Path) -> None:
    rules = RequestRules("none", public_web())
    with serving(PUBLIC, {"/weights.tar": tar.read_bytes()}) as server:
        for weights in (
            f"https://weights.example:{server.server_port}/weights.tar",
            data_url(tar),
            str(tar),
            "/absent",
        ):
            with pytest.raises(RefusedWeightsError, match="takes no weights from requests"):
                rules.open(weights)
        assert server.connections == 0


def test_the_setting_any_allows_paths_and_private_servers(tiny_model_folder: Path, tar: Path) -> None:
    rules = RequestRules("any")
    with web_server(tar.parent) as address:
        for weights in (str(tiny_model_folder), str(tar), f"{address}/weights.tar", data_url(tar)):
            assert names(rules.open(weights).path) == names(tiny_model_folder)
        for weights in ("/etc/passwd", "/absent", "/etc", f"{address}/absent", "http://127.0.0.1:9/", "data:,x"):
            with pytest.raises(RefusedWeightsError) as error:
                rules.open(weights)
            assert str(error.value) == REFUSALS["any"]


def test_damaged_weights_have_their_own_message(tar: Path) -> None:
    with serving(PUBLIC, {"/weights.tar": tar.read_bytes()[:50_000]}) as server:
        url = f"https://weights.example:{server.server_port}/weights.tar"
        with pytest.raises(
            ModelFolderError, match=rf"^{url}: is damaged, cut off or no archive .*; download or copy it again"
        ):
            HTTPS.open(url)


def test_a_full_cache_has_a_message_without_a_folder(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE_GB", "0")
    with pytest.raises(CacheError, match=r"^the server has no room for more weights now; try again later$"):
        HTTPS.open(data_url(tar))
    monkeypatch.setenv("CLIP_GEN_CACHE", "/proc/nowhere")
    with pytest.raises(CacheError, match=r"^the server has no room"):
        HTTPS.open(data_url(tar))


def test_downloads_are_limited_but_cached_weights_do_not_wait(tar: Path) -> None:
    content = tar.read_bytes()
    rules = replace(HTTPS, downloads=threading.Semaphore(1), wait_seconds=0.3)
    with serving(PUBLIC, {"/a.tar": content, "/b.tar": content}) as server, ThreadPoolExecutor(1) as pool:
        base = f"https://weights.example:{server.server_port}"
        rules.open(f"{base}/a.tar")
        assert rules.downloads.acquire(blocking=False)  # another download runs
        rules.open(f"{base}/a.tar")
        with pytest.raises(BusyError, match=r"^the server is downloading other weights; try again later$"):
            rules.open(f"{base}/b.tar")
        waiting = pool.submit(replace(rules, wait_seconds=60).open, f"{base}/b.tar")
        time.sleep(0.3)
        assert not waiting.done()
        rules.downloads.release()
        assert waiting.result(30).path.is_dir()
        assert rules.downloads.acquire(blocking=False)  # it gave its turn back


def test_trainings_and_predictions_share_the_limit_of_downloads(tar: Path, tmp_path: Path) -> None:
    rules = RequestRules.from_environment()
    for _ in range(MAX_DOWNLOADS):
        assert rules.downloads.acquire(blocking=False)
    try:
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(fetched_base(data_url(tar)), timeout=0.5))
    finally:
        rules.downloads.release(MAX_DOWNLOADS)
    assert names(asyncio.run(fetched_base(data_url(tar))).path)


def test_the_setting_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIP_GEN_ALLOW_WEIGHTS", raising=False)
    assert RequestRules.from_environment().allowed == "https"
    for value in REFUSALS:
        monkeypatch.setenv("CLIP_GEN_ALLOW_WEIGHTS", value)
        assert RequestRules.from_environment().allowed == value
    monkeypatch.setenv("CLIP_GEN_ALLOW_WEIGHTS", "all")
    with pytest.raises(ValueError, match="CLIP_GEN_ALLOW_WEIGHTS is all; give one of none, https, any"):
        RequestRules.from_environment()
