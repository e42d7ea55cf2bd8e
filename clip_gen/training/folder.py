"""The folder of a training: whether it may be used, its unpacked pictures, and its settings.

It holds weights.tar, model/, report.html and work/, from which a training resumes. Only a folder that is new, empty or
made by a training is used, so a training never replaces other files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from math import inf
from pathlib import Path

from clip_gen import files
from clip_gen.data.archive import Pictures, unpack
from clip_gen.data.manifest import INDEX, unpacked
from clip_gen.data.sources import Sources
from clip_gen.training.plan import TrainSettings
from clip_gen.training.shards import gather
from clip_gen.weights.model_folder import FILES, check_model_folder

KIND = "training"
SETTINGS = "settings.json"
PICTURES = "pictures"
CHANGEABLE = ("max_minutes", "sample_prompts")  # settings that a resumed training may change


def check(out: Path) -> None:
    """ValueError naming the first other file, unless a training may write here. Writes nothing."""
    files.check_claimable(out, KIND, has_settings(out))
    check_model_folder(out / "model")
    pictures = out / "work" / PICTURES
    listed = (
        {path.relative_to(pictures).parts[0] for path in unpacked(pictures).paths}
        if (pictures / INDEX).is_file()
        else set()
    )
    others = [name for name in files.list_names(pictures) if name not in {INDEX, *listed}]
    if others:
        raise ValueError(f"{pictures} holds {others[0]}, which no training put there; move it elsewhere")


def claim(out: Path) -> None:
    """Creates the folder and marks it as a training's; ValueError if it holds other files."""
    files.claim_folder(out, KIND, has_settings(out))


def has_settings(out: Path) -> bool:
    """Whether the folder holds the settings of a training. Earlier versions marked their folders by nothing else."""
    try:
        names = set(saved_settings(out))
    except (OSError, ValueError, TypeError):
        return False
    return {"stage", "base", "vqgan_steps", "transformer_steps", "seed"} <= names


def remove_incomplete_files(out: Path) -> None:
    """Removes files and folders that a killed training was writing."""
    for folder in (out, *(path.parent for path in (out / "work").rglob(f"{files.PARTIAL}*"))):
        files.remove_leftovers(folder, seconds=0)


def unpack_once(
    images: Sources, out: Path, settings: TrainSettings, shard_gb: float = inf, resolution: int = 0
) -> Pictures:
    """The pictures of `images`, unpacked into work/pictures unless they are there already; of shards see `gather`.

    ValueError if the training in `out` began with other pictures. Pictures that were unpacked for a training that did
    not begin are replaced.
    """
    folder, source = out / "work" / PICTURES, out / "work" / "source"
    has_begun = (out / "work" / SETTINGS).is_file()
    before = source.read_text() if source.is_file() else ""
    now = images.fingerprint() if images.exist() else before
    if has_begun and before not in ("", now):
        raise ValueError(
            f"{images} is not what it was when the training in {out} began; name another folder for "
            "a training on these pictures, or restore the earlier ones to resume"
        )
    if folder.is_dir() and (has_begun or before == now):
        return unpacked(folder)
    source.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    if images.shards:
        pictures = gather(images.shards, folder, resolution, 1e9 * shard_gb, settings.seed)
    else:
        paths = images.paths[0] if len(images.paths) == 1 else images.paths
        pictures = unpack(paths, folder, name=str(images))
    files.write_text_atomic(source, now)
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
    # An earlier version without a setting worked like its default, except that it had no LoRA.
    before = asdict(TrainSettings()) | {"lora": "off"} | before if before else values
    for name in sorted(values.keys() & before.keys()):
        if before[name] != values[name]:
            raise ValueError(
                f"{out} holds a training with {name} {before[name]!r}, not {values[name]!r}; "
                "give the same value to resume it, or name another folder"
            )
    files.write_text_atomic(out / "work" / SETTINGS, json.dumps(values, indent=1))


def hash_of_model(folder: Path) -> str:
    """Identifies the contents of a model folder, wherever it is."""
    hashes = [f"{name} {files.sha256_of(folder / name)}" for name in FILES if (folder / name).is_file()]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
