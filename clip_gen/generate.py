"""The command `python -m clip_gen generate`: writes pictures of a prompt to numbered files, best first."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from clip_gen.files import PARTIAL, check_writable, shortened
from clip_gen.images import OUTPUT_FORMATS, save_image
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.validation import MAX_CANDIDATES, MAX_SEED, check_number, check_request, without_effect
from clip_gen.weights.default_model import default_model

log = logging.getLogger(__name__)

QUALITY = 90
DEFAULTS = {"candidates": 16, "num_outputs": 4, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "guidance": 1.0}
# Settings of HFAiLab's demo of the published COCO model.
PRESETS = {"coco": {"candidates": 64, "num_outputs": 8, "top_k": 500, "top_p": 0.95}}
HELP = {
    "candidates": f"pictures to draw and choose from, 1 to {MAX_CANDIDATES}",
    "num_outputs": "pictures to write, best first, 1 to the number of candidates",
    "top_k": "choose from the k likeliest tokens; 0: from all",
    "top_p": "choose from the likeliest tokens that make up this share, 0 to 1; 1: from all",
    "temperature": "higher varies more, 0 to 10; 0: always the likeliest token",
    "guidance": "how hard to push towards the prompt, 0 to 20; 1: off",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--model", help="a model folder, a training's folder, a weights tar or its URL")
    parser.add_argument("--out", default=".", help="folder for the pictures; default: the current one")
    parser.add_argument("--name", help="write NAME.0.png, NAME.1.png, ...; default: 0.png, 1.png, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--preset", choices=PRESETS, help="settings for a known model; other options override them")
    for name, value in DEFAULTS.items():
        text = f"{HELP[name]}; default {value}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=text)
    parser.add_argument(
        "--clip-rerank",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="return the best pictures by CLIP score; off: the first ones drawn",
    )
    parser.add_argument("--seed", type=int, help=f"0 to {MAX_SEED}: same seed, same pictures; default: random")
    parser.add_argument("--output-format", choices=OUTPUT_FORMATS, default="png", help="default png")
    quality = f"of webp and jpg, 0 to 100; webp is lossless at 100; default {QUALITY}"
    parser.add_argument("--output-quality", type=int, default=QUALITY, help=quality)
    parser.add_argument(
        "--output-metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the prompt and the settings into each file",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if available")


def main(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    settings = checked_settings(arguments)
    if not arguments.out:
        raise ValueError("--out is empty; name a folder for the pictures")
    start = f"{arguments.name}." if arguments.name else ""
    names = [f"{start}{i}.{arguments.output_format}" for i in range(settings["num_outputs"])]
    check_folder(Path(arguments.out), names, arguments.overwrite)
    if arguments.model:
        weights, reason = arguments.model, "the command names it"
    else:
        weights, reason = default_model(os.environ.get("COG_WEIGHTS"))
    model = ClipGen.load(weights, arguments.device)
    log.info("model: %s from %s on %s: %s", model.config.name, shortened(weights), model.device, reason)
    result = model.generate(arguments.prompt, **settings)
    # Identical candidates are drawn once, so there may be fewer pictures than names.
    paths = [Path(arguments.out, name) for name in names[: len(result.images)]]
    settings |= {"prompt": arguments.prompt, "candidates": result.candidates, "seed": result.seed}
    settings["model"] = model.config.name
    metadata = settings if arguments.output_metadata else None
    write_pictures(result, paths, metadata, arguments.output_format, arguments.output_quality)
    for path, score in zip(paths, result.scores, strict=True):
        print(f"{path}  score {score:.4f}")
    print(f"seed {result.seed}, model {model.config.name}, {time.monotonic() - started:.1f} seconds")


def checked_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """Arguments of ClipGen.generate except the prompt; ValueError if one is out of range."""
    given = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    settings = {**DEFAULTS, **PRESETS.get(arguments.preset, {}), **given, "seed": arguments.seed}
    settings["clip_rerank"] = arguments.clip_rerank
    check_number("output_quality", arguments.output_quality, 0, 100, whole=True)
    check_request(arguments.prompt, **settings)
    quality = {"output_format": arguments.output_format, "output_quality": arguments.output_quality}
    for sentence in without_effect(settings | quality, DEFAULTS | {"output_quality": QUALITY}):
        log.warning(sentence)
    return settings


def write_pictures(
    result: Generation, paths: Sequence[Path], metadata: dict[str, object] | None, output_format: str, quality: int
) -> None:
    """Writes all pictures or none. OSError if one cannot be written; then the existing files are as before."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    path = paths[0]
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=PARTIAL) as folder, contextlib.ExitStack() as undo:
            for path, image, score in zip(paths, result.images, result.scores, strict=True):
                about = None if metadata is None else metadata | {"score": round(score, 4)}
                save_image(image, Path(folder, path.name), output_format, quality, about)
            for path in paths:
                if path.exists():
                    earlier = shutil.copy2(path, Path(folder, f"earlier-{path.name}"))
                    undo.callback(os.replace, earlier, path)
                else:
                    undo.callback(path.unlink, missing_ok=True)
                os.replace(Path(folder, path.name), path)
            undo.pop_all()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


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
