"""The folder of a training: whether it may be used, its unpacked pictures, and its settings.

It holds weights.tar, model/, report.html and work/, from which a training resumes. Only a folder that is new, empty or
made by a training is used, so a training never replaces other files.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

from clip_gen.data.archive import Pictures, fingerprint, unpack
from clip_gen.data.manifest import INDEX, unpacked
from clip_gen.files import (
    PARTIAL,
    check_claimable,
    claim_folder,
    list_names,
    remove_leftovers,
    sha256_of,
    write_text_atomic,
)
from clip_gen.training.plan import TrainSettings
from clip_gen.weights.model_folder import FILES, check_model_folder

KIND = "training"
SETTINGS = "settings.json"
PICTURES = "pictures"
CHANGEABLE = ("max_minutes", "sample_prompts")  # settings that a resumed training may change
UNPACKED = re.compile(r"(\d{6}|staged)[.-]\w+")  # the names that data.archive.unpack gives to files


def check_training_folder(out: Path) -> None:
    """ValueError naming the first other file, unless a training may write here. Writes nothing."""
    check_claimable(out, KIND, made_before_marks)
    check_model_folder(out / "model")
    pictures = out / "work" / PICTURES
    others = _not_unpacked(pictures)
    if others:
        raise ValueError(f"{pictures} holds {others[0]}, which no training put there; move it elsewhere")


def claim_training_folder(out: Path) -> None:
    """Creates the folder and marks it as a training's; ValueError like check_training_folder."""
    check_training_folder(out)
    claim_folder(out, KIND, made_before_marks)


def remove_incomplete_files(out: Path) -> None:
    """Removes files and folders that a killed training was writing."""
    for folder in (out, *(path.parent for path in (out / "work").rglob(f"{PARTIAL}*"))):
        remove_leftovers(folder, seconds=0)


def unpack_once(images: Path, out: Path) -> Pictures:
    """The pictures of `images`, unpacked into work/pictures unless they are there already.

    ValueError if the training in `out` began with other pictures. Pictures that were unpacked for a training that did
    not begin are replaced.
    """
    folder, source = out / "work" / PICTURES, out / "work" / "source"
    has_begun = (out / "work" / SETTINGS).is_file()
    before = source.read_text() if source.is_file() else None
    now = fingerprint(images) if images.exists() else before or ""
    if has_begun and before not in (None, now):
        raise ValueError(
            f"{images} is not what it was when the training in {out} began; name another folder for "
            "a training on these pictures, or restore the earlier ones to resume"
        )
    if folder.is_dir():
        if has_begun or before == now:
            return unpacked(folder)
        source.unlink(missing_ok=True)
        shutil.rmtree(folder)
    pictures = unpack(images, folder)
    write_text_atomic(source, now)
    return pictures


def saved_settings(out: Path) -> dict[str, object]:
    """The settings of the training in `out`; empty if none has begun there."""
    path = out / "work" / SETTINGS
    return json.loads(path.read_text()) if path.is_file() else {}


def save_settings(out: Path, settings: TrainSettings, base: Path, on_gpu: bool) -> None:
    """Writes settings.json; ValueError if the training in `out` began with other settings or another base model."""
    values = asdict(settings) | {"base": hash_of_model(base), "on_gpu": on_gpu}
    for name in CHANGEABLE:
        values.pop(name)
    before = saved_settings(out)
    if before and before["base"] != values["base"]:
        raise ValueError(
            f"{out} holds a training from another base than {settings.base or base}; "
            "give the same model to resume it, or name another folder"
        )
    if before:
        # An earlier version without a setting worked like its default.
        before = asdict(TrainSettings()) | before
        for name in sorted(values.keys() & before.keys()):
            if before[name] != values[name]:
                raise ValueError(
                    f"{out} holds a training with {name} {before[name]!r}, not {values[name]!r}; "
                    "give the same value to resume it, or name another folder"
                )
    write_text_atomic(out / "work" / SETTINGS, json.dumps(values, indent=1))


def hash_of_model(folder: Path) -> str:
    """Identifies the contents of a model folder, wherever it is."""
    hashes = [f"{name} {sha256_of(folder / name)}" for name in FILES if (folder / name).is_file()]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


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
    """Whether it holds only the files of a training that ended before it wrote its settings."""
    work = out / "work"
    if list_names(out) != ["work"] or not (work / "lock").is_file() or (work / "lock").stat().st_size:
        return False
    for path in work.iterdir():
        if path.name == PICTURES:
            if not (path / INDEX).is_file() or _not_unpacked(path):
                return False
        elif path.name == f".unpacking-{PICTURES}":
            if not all(UNPACKED.fullmatch(file.name) or file.name == INDEX for file in path.iterdir()):
                return False
        elif path.name not in ("lock", "source") and not path.name.startswith(PARTIAL):
            return False
    return True


def _not_unpacked(pictures: Path) -> list[str]:
    """Names in a folder of unpacked pictures that its index does not list; all of them if it has no index."""
    names = list_names(pictures)
    try:
        listed = {path.name for path in unpacked(pictures).paths} | {INDEX}
    except (OSError, ValueError, KeyError, TypeError):
        return names
    return [name for name in names if name not in listed]
