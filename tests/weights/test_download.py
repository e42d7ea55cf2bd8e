"""weights/download.py against a server that fails in every way: the whole file, or one clear error."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from bad_server import bad_server

from clip_gen.weights import download
from clip_gen.weights import url as url_module
from clip_gen.weights.download import fetch

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACK_OFF_SECONDS", 0.001)
    monkeypatch.setattr(url_module, "TIMEOUT_SECONDS", 0.3)


@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no tags"])
@pytest.mark.parametrize(
    "plan",
    [
        *([], ["drop"], ["truncate"], ["stall"], [500], [503, 429, 408], ["drop"] * 12),
        *(["drop", "ignore"], ["truncate", 500, "stall", "drop", "ignore"]),
    ],
    ids=str,
)
def test_the_whole_file_arrives_from_a_failing_server(plan: list[str | int], tags: bool, tmp_path: Path) -> None:
    with bad_server({"a.pt": CONTENT}, plan, tags) as server:
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_broken_download_resumes_where_it_stopped(tmp_path: Path) -> None:
    with bad_server({"a.pt": CONTENT}, ["truncate", "truncate"]) as server:
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt")
    half, quarters = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    assert [header for _, header in server.requests] == [None, f"bytes={half}-", f"bytes={quarters}-"]


def test_the_next_run_resumes_too(tmp_path: Path) -> None:
    with bad_server({"a.pt": CONTENT}, ["truncate", *[500] * 5]) as server:
        with pytest.raises(ValueError, match=r"answers 500.*resumes where this one stopped"):
            fetch(f"{server.address}/a.pt", tmp_path / "a.pt")
        assert not (tmp_path / "a.pt").exists()
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
    assert server.requests[-1][1] == f"bytes={len(CONTENT) // 2}-"
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no tags"])
def test_a_file_that_changed_is_not_appended_to_the_old_part(tags: bool, tmp_path: Path) -> None:
    with bad_server({"a.pt": CONTENT}, ["truncate", *[500] * 5], tags) as server:
        with pytest.raises(ValueError, match="answers 500"):
            fetch(f"{server.address}/a.pt", tmp_path / "a.pt")
        server.files["a.pt"] = new = CONTENT[::-1] + b"more"
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == new


def test_a_complete_part_is_not_downloaded_again(tmp_path: Path) -> None:
    (tmp_path / "a.pt.part").write_bytes(CONTENT)
    (tmp_path / "a.pt.part.json").write_text(f'{{"validator": null, "total": {len(CONTENT)}}}')
    with bad_server({"a.pt": CONTENT}) as server:
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
    assert server.requests == []


def test_a_damaged_part_is_downloaded_again_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "a.pt.part").write_bytes(bytes(len(CONTENT) // 2))
    (tmp_path / "a.pt.part.json").write_text(f'{{"validator": "", "total": {len(CONTENT)}}}')
    with bad_server({"a.pt": CONTENT}) as server:
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT
    assert [header for _, header in server.requests] == [f"bytes={len(CONTENT) // 2}-", None]


def test_a_part_longer_than_the_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.pt.part").write_bytes(CONTENT + b"more")
    (tmp_path / "a.pt.part.json").write_text('{"validator": null, "total": 1024000}')
    with bad_server({"a.pt": CONTENT}) as server:
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("plan", "sentence", "requests"),
    [
        ([404], r"the server answers 404 \(Not Found\); look at the address, or give another --mirror", 1),
        ([403], r"the server answers 403", 1),
        ([500] * 9, r"cannot be downloaded \(the server answers 500.*6 times in a row", 6),
        (["stall", *[503] * 6], r"the server answers 503", 6),
        (["wrong"], r"its sha256 is \w{64}, wanted is " + SHA256, 1),
        (["drop", "wrong"], r"its sha256 is \w{64}, wanted is " + SHA256, 2),
    ],
)
def test_a_failed_download_is_one_sentence_and_leaves_no_file(
    plan: list[str | int], sentence: str, requests: int, tmp_path: Path
) -> None:
    with bad_server({"a.pt": CONTENT}, plan) as server, pytest.raises(ValueError, match=sentence) as raised:
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
    assert "\n" not in str(raised.value)
    assert len(server.requests) == requests
    assert not (tmp_path / "a.pt").exists()


def test_a_missing_server_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be downloaded \(.*refused"):
        fetch("http://127.0.0.1:9/a.pt", tmp_path / "a.pt")


def test_an_existing_file_is_downloaded_again_only_if_its_sha256_differs(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(CONTENT)
    with bad_server({"a.pt": CONTENT}) as server:
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
        assert server.requests == []
        (tmp_path / "a.pt").write_bytes(CONTENT[:-1])
        fetch(f"{server.address}/a.pt", tmp_path / "a.pt", SHA256)
    assert (tmp_path / "a.pt").read_bytes() == CONTENT


def test_a_proxy_is_used_if_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bad_server({"a.pt": CONTENT}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.delenv("no_proxy", raising=False)
        fetch("http://weights.invalid/a.pt", tmp_path / "a.pt", SHA256)
    assert proxy.requests == [("http://weights.invalid/a.pt", None)]
