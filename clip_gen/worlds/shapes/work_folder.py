"""The files of the command `train-shapes` in its work folder: a folder for each part, with settings and record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path

from clip_gen.files import list_names, write_text_atomic

PARTS = ("clip", "vqgan", "gpt", "bridge", "ranker")
SETTINGS, RECORD = "told.json", "record.json"  # in the folder of a part


def may_resume(path: Path, settings: dict[str, object]) -> bool:
    """Saves a part's settings to `path`; False if it was started with other ones. The number of steps may change."""

    def without_steps(settings: dict[str, object]) -> dict[str, object]:
        fit = {name: value for name, value in settings.get("fit", {}).items() if name != "steps"}
        return settings | {"fit": fit}

    if path.is_file() and without_steps(json.loads(path.read_text())) != without_steps(settings):
        return False
    write_json(path, settings)
    return True


def write_json(path: Path, values: dict[str, object]) -> None:
    write_text_atomic(path, json.dumps(values))


def changed_fields(config: object) -> dict[str, object]:
    """The fields that differ from their defaults, so that a new field with its default makes no other recipe."""
    values = {spec.name: (getattr(config, spec.name), spec.default) for spec in fields(config)}
    return {name: value for name, (value, default) in values.items() if value != default}


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def has_parts(work: Path) -> bool:
    """Whether an earlier version of this command, which did not mark its folders, made this one."""
    written = [*work.glob(f"*/{SETTINGS}"), *work.glob(f"*/{RECORD}")]
    return bool(written) and set(list_names(work)) <= {*PARTS, "encoded"} and all(map(_is_of_a_part, written))


def _is_of_a_part(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and ("told" in values or "seed" in values)
