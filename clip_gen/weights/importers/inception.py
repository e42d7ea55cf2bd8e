"""InceptionV3 in the original FID weights, in torch-fidelity's file, to one folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from clip_gen.config import has_settings
from clip_gen.files import atomic_folder, check_replaceable
from clip_gen.weights.importers.reader import origin, read_checkpoint
from clip_gen.weights.model_folder import write_part

log = logging.getLogger(__name__)

WEIGHTS, RECORD = "inception.safetensors", "inception.json"


def import_inception(published: Path, out: Path, url: str) -> None:
    """Writes a folder with the weights as published and a record of their origin, atomically.

    url: where the file is published, for the record. ValueError if the file cannot be used.
    """
    check_inception_folder(out)
    tensors = read_checkpoint(published).tensors
    record = {"inception": {"format": "torch-fidelity", **origin(published), "url": url}}
    with atomic_folder(out) as folder:
        write_part(tensors, folder / WEIGHTS)
        (folder / RECORD).write_text(json.dumps({"imported": record}, indent=2) + "\n", encoding="utf-8")
    log.info(f"{out}: {WEIGHTS}, {RECORD}")


def check_inception_folder(out: Path) -> None:
    """ValueError unless the folder is new, empty or an Inception folder, which may be replaced."""
    check_replaceable(out, "Inception", (WEIGHTS, RECORD), has_settings(out / RECORD, ["imported"]))
