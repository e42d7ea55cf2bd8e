"""The files of drawn pictures: what is written into them, and where they may go."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from clip_gen.enlarging import upscaler_name
from clip_gen.files import PARTIAL, check_writable, sha256_of
from clip_gen.images import contact_sheet, save_image
from clip_gen.pipeline import ClipGen, Generation

INPUT_PICTURES = ("image", "init_image", "mask")  # settings that are picture files


def drawing_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """The arguments of ClipGen.generate among the settings."""
    return {name: value for name, value in settings.items() if not name.startswith("output_")}


def description(model: ClipGen, result: Generation, settings: Mapping[str, object]) -> dict[str, object]:
    """What is written into the files of a result: the settings, and what else it takes to draw the pictures again.

    Of pictures only the hashes, because their names may be private. Settings without a value are left out.
    """
    hidden = {*INPUT_PICTURES, "output_metadata", "output_grid"}
    hidden |= set() if settings["image"] and settings["prompt"] else {"image_weight"}
    hidden |= {"output_size"} if settings["output_size"] == "1x" else set()
    given = {name: settings[name] for name in INPUT_PICTURES if settings[name]}
    found = {name: value for name, value in settings.items() if name not in hidden} | {
        **{f"{name}_sha256": sha256_of(path) for name, path in given.items()},
        "upscaler": upscaler_name(settings["output_size"]),
        "candidates": result.candidates,
        "num_outputs": len(result.images),
        "guidance": result.guidance,
        "seed": result.seed,
        "model": model.config.name,
        "model_sha256": model.sha256,
        "device": model.device.type,
        "dtype": str(model.gpt.cache_dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def write_pictures(
    result: Generation,
    paths: Sequence[Path],
    metadata: dict[str, object] | None,
    output_format: str,
    quality: int,
    sheet: Path | None = None,
    enlarge: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> None:
    """Writes all pictures or none, with number and score unless metadata is None. OSError if one cannot be written.

    sheet: where to write a contact sheet of them, at the model's size, in the same folder. enlarge: of `enlarger`.
    """
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as temporary:
            for number, (path, image, score) in enumerate(zip(paths, result.images, result.scores, strict=True)):
                about = None if metadata is None else metadata | {"number": number, "score": round(score, 4)}
                save_image(enlarge(image), Path(temporary, path.name), output_format, quality, about)
            if sheet:
                save_image(contact_sheet(result.images), Path(temporary, sheet.name), output_format, quality, metadata)
            for path in [*paths, *filter(None, [sheet])]:
                os.replace(Path(temporary, path.name), path)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to ({error.strerror or error})") from error


def check_folder(folder: Path, names: list[str], overwrite: bool) -> None:
    """ValueError if the folder cannot be written to, or has files of these names and overwrite is False."""
    check_writable(folder)
    for path in (folder / name for name in names):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(
                f"{path} exists already and is not a plain file; move it, or choose another folder or name"
            )
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already; give --overwrite, or name another folder with --out")
