"""InceptionV3 in the original FID weights, in torch-fidelity's file, to one folder."""

from __future__ import annotations

from pathlib import Path

from clip_gen.weights.importers.reader import origin, read_checkpoint
from clip_gen.weights.importers.single_network import check_network_folder, write_network_folder

WEIGHTS, RECORD = "inception.safetensors", "inception.json"


def import_inception(published: Path, out: Path, url: str) -> None:
    """Writes a folder with the weights as published and a record of their origin, atomically.

    url: where the file is published, for the record. ValueError if the file cannot be used.
    """
    check_inception_folder(out)
    tensors = read_checkpoint(published).tensors
    imported = {"inception": {"format": "torch-fidelity", **origin(published), "url": url}}
    write_network_folder(out, WEIGHTS, RECORD, tensors, imported)


def check_inception_folder(out: Path) -> None:
    """ValueError unless the folder is new, empty or an Inception folder, which may be replaced."""
    check_network_folder(out, "Inception", WEIGHTS, RECORD)
