"""script/*: each finds the project from wherever it is called."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("path", sorted((ROOT / "script").iterdir()), ids=lambda path: path.name)
def test_every_script_looks_through_links_for_the_project(path: Path) -> None:
    assert 'readlink -f "$0"' in path.read_text()
