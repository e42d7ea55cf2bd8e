"""The command `python -m clip_gen generate`: writes pictures to numbered files, best first."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clip_gen.files import PARTIAL, check_writable, sha256_of, shortened
from clip_gen.images import OUTPUT_FORMATS, save_image
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.sampling.condition import open_picture
from clip_gen.validation import MAX_CANDIDATES, MAX_SEED, check_number, check_request, without_effect
from clip_gen.weights.default_model import default_model

log = logging.getLogger(__name__)

# Default and help of each setting.
SETTINGS = {
    "image": (None, "a picture's file, to draw variations of, or to mix with the prompt"),
    "image_weight": (0.5, "share of the image beside a prompt, 0 to 1"),
    "negative_prompt": ("", "what the pictures should not show"),
    "candidates": (16, f"pictures to draw and choose from, 1 to {MAX_CANDIDATES}"),
    "num_outputs": (4, "pictures to write, best first, 1 to the number of candidates"),
    "top_k": (0, "choose from the k likeliest tokens; 0: from all"),
    "top_p": (1.0, "choose from the likeliest tokens that make up this share, 0 to 1; 1: from all"),
    "temperature": (1.0, "higher varies more, 0 to 10; 0: always the likeliest token"),
    "guidance": (1.0, "how hard to push towards the prompt, 0 to 20; 1: off"),
    "seed": (None, f"same seed, same pictures, 0 to {MAX_SEED}"),
    "clip_rerank": (True, "return the best pictures by CLIP score; off: the first ones drawn"),
    "output_format": ("png", "file type"),
    "output_quality": (90, "of webp and jpg, 0 to 100; webp is lossless at 100"),
    "output_metadata": (True, "write the prompt and the settings into each file"),
}
KINDS = {"image": Path, "seed": int}  # of settings whose default is None
DEFAULTS = {name: default for name, (default, _) in SETTINGS.items()}
# Settings of HFAiLab's demo of the published COCO model.
PRESETS = {"coco": {"candidates": 64, "num_outputs": 8, "top_k": 500, "top_p": 0.95}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default="", help='what to draw; with weights: "a red circle:2 | a star:1"')
    parser.add_argument("--model", help="a model folder, a training's folder, a weights tar or its URL")
    parser.add_argument("--out", default=".", help="folder for the pictures; default: the current one")
    parser.add_argument("--name", help="write NAME.0.png, NAME.1.png, ...; default: 0.png, 1.png, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--preset", choices=PRESETS, help="settings for a known model; other options override them")
    for name, (value, words) in SETTINGS.items():
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif name == "output_format":
            how = {"choices": OUTPUT_FORMATS}
        else:
            how = {"type": KINDS.get(name) or type(value)}
        default = {"image": "", "negative_prompt": "", "seed": "; default random"}.get(name, f"; default {value}")
        parser.add_argument(f"--{name.replace('_', '-')}", help=words + default, **how)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if available")


def main(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    settings = checked_settings(arguments)
    output_format, quality = settings["output_format"], settings["output_quality"]
    start = f"{arguments.name}." if arguments.name else ""
    names = [f"{start}{i}.{output_format}" for i in range(settings["num_outputs"])]
    check_folder(Path(arguments.out), names, arguments.overwrite)
    weights, reason = arguments.model, "the command names it"
    if not weights:
        weights, reason = default_model(os.environ.get("COG_WEIGHTS"))
    model = ClipGen.load(weights, arguments.device)
    log.info("model: %s from %s on %s: %s", model.config.name, shortened(weights), model.device, reason)
    result = model.generate(**{name: value for name, value in settings.items() if not name.startswith("output_")})
    # Identical candidates are drawn once, so there may be fewer pictures than names.
    paths = [Path(arguments.out, name) for name in names[: len(result.images)]]
    metadata = description(model, result, settings) if settings["output_metadata"] else None
    write_pictures(result, paths, metadata, output_format, quality)
    for path, score in zip(paths, result.scores, strict=True):
        print(f"{path}  score {score:.4f}")
    print(f"seed {result.seed}, model {model.config.name}, {time.monotonic() - started:.1f} seconds")


def checked_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The prompt and the settings; ValueError if one is out of range."""
    given = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    settings = DEFAULTS | PRESETS.get(arguments.preset, {}) | given | {"prompt": arguments.prompt}
    check_number("output_quality", settings["output_quality"], 0, 100, whole=True)
    check_request(**settings)
    if settings["image"] is not None:
        open_picture(settings["image"])  # an unusable one is refused before the model is loaded
    for sentence in without_effect(settings, DEFAULTS):
        log.warning(sentence)
    return settings


def description(model: ClipGen, result: Generation, settings: Mapping[str, object]) -> dict[str, object]:
    """What is written into the files of a result: the settings, and what else it takes to draw the pictures again.

    Of an image prompt only the hash, because its name may be private. Settings without a value are left out.
    """
    image = settings["image"]
    hidden = (
        ("image", "output_metadata") if image and settings["prompt"] else ("image", "output_metadata", "image_weight")
    )
    found = {name: value for name, value in settings.items() if name not in hidden} | {
        "image_sha256": image and sha256_of(image),
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
    result: Generation, paths: Sequence[Path], metadata: dict[str, object] | None, output_format: str, quality: int
) -> None:
    """Writes all pictures or none, with number and score unless metadata is None. OSError if one cannot be written."""
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=PARTIAL) as temporary:
            for number, (path, image, score) in enumerate(zip(paths, result.images, result.scores, strict=True)):
                about = None if metadata is None else metadata | {"number": number, "score": round(score, 4)}
                save_image(image, Path(temporary, path.name), output_format, quality, about)
            for path in paths:
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
