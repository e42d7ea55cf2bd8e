"""script/*: each finds the project from wherever it is called."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from clip_gen.cog_schema import ROOT


@pytest.mark.parametrize("name", ["predict", "serve", "test", "train-shapes", "bench"])
def test_a_script_works_through_a_link_and_whatever_cdpath_says(tmp_path: Path, name: str) -> None:
    (tmp_path / "script").mkdir()
    (link := tmp_path / "script" / name).symlink_to(ROOT / "script" / name)
    run = subprocess.run(
        [link.relative_to(tmp_path), "--help"],
        **{"cwd": tmp_path, "env": {**os.environ, "CDPATH": "."}, "capture_output": True, "text": True},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"PORT": "abc"}, "PORT is abc; give a number, 1 to 65535"),
        ({"PORT": "99999"}, "PORT is 99999; give a number, 1 to 65535"),
        ({"COG_WEIGHTS": "nowhere.tar"}, "COG_WEIGHTS is nowhere.tar: no such file; give a folder, a tar or a URL"),
    ],
)
def test_a_server_that_cannot_be_started_says_why(environment: dict[str, str], sentence: str) -> None:
    assert refused_to_serve(environment) == f"script/serve: {sentence}\n"


def test_a_port_that_is_in_use_is_no_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused_to_serve({"PORT": str(port)})
    assert said == f"script/serve: port {port} is in use; set another, as in PORT=5001 script/serve\n"


def refused_to_serve(environment: dict[str, str]) -> str:
    run = subprocess.run(
        [ROOT / "script" / "serve"], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    return run.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "script").iterdir()), ids=lambda path: path.name)
def test_every_script_looks_through_links_for_the_project(path: Path) -> None:
    assert 'readlink -f "$0"' in path.read_text()
