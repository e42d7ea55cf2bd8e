"""The folder of a training: whether it may be written into, and what earlier or killed trainings left in it.

It holds weights.tar, model/, report.html and work/, from which a training resumes. Only a folder that is new, empty or
made by a training is used, so that a training never replaces a person's own files.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from clip_gen.data.manifest import INDEX, unpacked
from clip_gen.files import PARTIAL, check_claimable, claim_folder, list_names
from clip_gen.training.plan import TrainSettings
from clip_gen.weights.model_folder import check_model_folder

KIND = "training"
SETTINGS = "settings.json"
PICTURES = "pictures"
UNPACKED = re.compile(r"(\d{6}|staged)[.-]\w+")  # the names that archives.unpack gives to files


def check_training_folder(out: Path) -> None:
    """ValueError, which names the first file in the way, unless a training may write here. Writes nothing."""
    check_claimable(out, KIND, made_before_marks)
    check_model_folder(out / "model")
    pictures = out / "work" / PICTURES
    strange = _not_unpacked(pictures)
    if strange:
        raise ValueError(f"{pictures} holds {strange[0]}, which no training put there; move it elsewhere")


def own_training_folder(out: Path) -> None:
    """Creates and marks the folder where check_training_folder allows it."""
    check_training_folder(out)
    claim_folder(out, KIND, made_before_marks)


def made_before_marks(out: Path) -> bool:
    """Whether a training by a version that wrote no mark file made this folder."""
    return _has_settings(out / "work" / SETTINGS) or _stopped_while_unpacking(out)


def _has_settings(path: Path) -> bool:
    """Whether the file holds the settings of a training; earlier versions had fewer of them."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    known = {field.name for field in fields(TrainSettings)} | {"on_gpu"}
    return isinstance(settings, dict) and {"stage", "base", "vqgan_steps", "transformer_steps", "seed"} <= (
        settings.keys() & known
    )


def _stopped_while_unpacking(out: Path) -> bool:
    """Whether it holds just what a training leaves that ends before it has written its settings."""
    work = out / "work"
    if list_names(out) != ["work"] or not (work / "lock").is_file() or (work / "lock").stat().st_size:
        return False
    for path in work.iterdir():
        if path.name == PICTURES:
            if not (path / INDEX).is_file() or _not_unpacked(path):
                return False
        elif path.name == f".unpacking-{PICTURES}":
            if not all(UNPACKED.fullmatch(one.name) or one.name == INDEX for one in path.iterdir()):
                return False
        elif path.name not in ("lock", "source") and not path.name.startswith(PARTIAL):
            return False
    return True


def _not_unpacked(pictures: Path) -> list[str]:
    """Names in a folder of unpacked pictures that its index does not list; all of them where it has no index."""
    names = list_names(pictures)
    try:
        listed = {path.name for path in unpacked(pictures).paths} | {INDEX}
    except (OSError, ValueError, KeyError, TypeError):
        return names
    return [name for name in names if name not in listed]
