"""The files that `cog build` copies to /src, in a folder: what .dockerignore lets through, and the schema."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path

from clip_gen.files import ROOT
from clip_gen.serving.openapi import build_schema

PATTERNS = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def is_ignored(path: str) -> bool:
    """As Docker decides it for a file: the last pattern that matches it or one of its folders."""
    ignored = False
    for pattern in PATTERNS:
        parts, wanted = path.split("/"), pattern.lstrip("!").split("/")
        starts = range(len(parts)) if wanted[0] == "**" else [0]
        wanted = [part for part in wanted if part != "**"]
        if any(_match(parts[start : start + len(wanted)], wanted) for start in starts):
            ignored = not pattern.startswith("!")
    return ignored


def _match(parts: list[str], wanted: list[str]) -> bool:
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def copy_image_files(folder: Path) -> Path:
    """Copies them to `folder`, without the models that are not in git."""

    def ignored(parent: str, names: list[str]) -> set[str]:
        inside = os.path.relpath(parent, ROOT)
        paths = {name: os.path.normpath(os.path.join(inside, name)) for name in names}
        pulled = {name for name in names if inside == "checkpoints" and name not in ("README.md", "emoji", "shapes")}
        return pulled | {name for name, path in paths.items() if is_ignored(path)}

    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / ".cog").mkdir()
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(build_schema()))
    return folder
