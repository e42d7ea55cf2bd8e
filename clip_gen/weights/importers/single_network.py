"""Folders of a single imported network, which is no model: its weights and a record of their origin."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from clip_gen.config import has_settings
from clip_gen.files import atomic_folder, check_replaceable
from clip_gen.weights.model_folder import write_part

log = logging.getLogger(__name__)


def write_network_folder(
    out: Path, weights: str, record: str, tensors: Mapping[str, Tensor], imported: Mapping[str, object]
) -> None:
    """Writes the folder atomically. weights, record: names of its two files; imported: the origin of each part."""
    with atomic_folder(out) as folder:
        write_part(tensors, folder / weights)
        (folder / record).write_text(json.dumps({"imported": imported}, indent=2) + "\n", encoding="utf-8")
    log.info(f"{out}: {weights}, {record}")


def check_network_folder(out: Path, name: str, weights: str, record: str) -> None:
    """ValueError unless the folder is new, empty or one of this network, which may be replaced."""
    check_replaceable(out, name, (weights, record), has_settings(out / record, ["imported"]))
