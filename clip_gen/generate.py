"""The command `python -m clip_gen generate`: writes pictures to numbered files, best first."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from clip_gen.enlarging import OUTPUT_SIZES, enlarger
from clip_gen.files import shortened
from clip_gen.hardware import own_share
from clip_gen.images import OUTPUT_FORMATS
from clip_gen.picture_files import INPUT_PICTURES, check_folder, description, drawing_settings, write_pictures
from clip_gen.pipeline import ClipGen
from clip_gen.progress_bar import LiveBar
from clip_gen.prompts_file import Line, draw_lines, read_prompts, undrawn_lines
from clip_gen.sampling.condition import open_picture
from clip_gen.validation import MAX_CANDIDATES, MAX_SEED, check_number, check_request, without_effect
from clip_gen.weights.default_model import default_model

log = logging.getLogger(__name__)

# Default and help of each setting.
SETTINGS = {
    "image": (None, "a picture's file, to draw variations of, or to mix with the prompt"),
    "image_weight": (0.5, "share of the image beside a prompt, 0 to 1"),
    "negative_prompt": ("", "what the pictures should not show"),
    "init_image": (None, "a picture's file, to redraw where the mask is white"),
    "mask": (None, "a picture's file, of init_image's shape: white is redrawn"),
    "candidates": (16, f"pictures to draw and choose from, 1 to {MAX_CANDIDATES}"),
    "num_outputs": (4, "pictures to write, best first, 1 to the number of candidates"),
    "top_k": (0, "choose from the k likeliest tokens; 0: from all"),
    "top_p": (1.0, "choose from the likeliest tokens that make up this share, 0 to 1; 1: from all"),
    "temperature": (1.0, "higher varies more, 0 to 10; 0: always the likeliest token"),
    "guidance": (1.0, "how hard to push towards the prompt, 0 to 20; 1: off"),
    "seed": (None, f"same seed, same pictures, 0 to {MAX_SEED}"),
    "clip_rerank": (True, "return the best-ranked pictures; off: the first ones drawn"),
    "output_format": ("png", "file type"),
    "output_quality": (90, "of webp and jpg, 0 to 100; webp is lossless at 100"),
    "output_size": ("1x", "size of the pictures; 1x: the model's own"),
    "output_grid": (False, "write a contact sheet of all pictures too, as grid.png"),
    "output_metadata": (True, "write the prompt and the settings into each file"),
}
KINDS = {**dict.fromkeys(INPUT_PICTURES, Path), "seed": int}  # of settings whose default is None
CHOICES = {"output_format": OUTPUT_FORMATS, "output_size": OUTPUT_SIZES}
DEFAULTS = {name: default for name, (default, _) in SETTINGS.items()}
# Settings of HFAiLab's demo of the published COCO model.
PRESETS = {"coco": {"candidates": 64, "num_outputs": 8, "top_k": 500, "top_p": 0.95}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default="", help='what to draw; with weights: "a cat:2 | a dog:1"')
    parser.add_argument(
        "--prompts-file", type=Path, help="draw each line of a text, CSV or JSONL file; finished ones are skipped"
    )
    parser.add_argument("--name", help="write NAME.0.png, NAME.1.png, ...; default: 0.png, 1.png, ...")
    parser.add_argument("--preset", choices=PRESETS, help="settings for a known model; other options override them")
    add_settings(parser, DEFAULTS)


def add_settings(parser: argparse.ArgumentParser, defaults: Mapping[str, object]) -> None:
    """The options for model, folder and device, and those for the settings in `defaults`, which the help names."""
    parser.add_argument("--model", help="a model folder, a training's folder, a weights tar or its URL")
    parser.add_argument("--out", default=".", help="folder for the pictures; default: the current one")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    for name, value in defaults.items():
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif name in CHOICES:
            how = {"choices": CHOICES[name]}
        else:
            how = {"type": KINDS.get(name) or type(value)}
        default = "; default random" if name == "seed" else "" if value in (None, "") else f"; default {value}"
        parser.add_argument(f"--{name.replace('_', '-')}", help=SETTINGS[name][1] + default, **how)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if available")


def main(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    folder, start = Path(arguments.out), f"{arguments.name}." if arguments.name else ""
    if arguments.prompts_file:
        lines = read_lines(arguments.prompts_file, given_settings(arguments))
        process, processes = own_share()
        model, lines = load_model(arguments), lines[process::processes]
        waiting = undrawn_lines(model, lines, folder)
        print(f"{len(lines) - len(waiting)} of {len(lines)} prompts were drawn before")
        draw_lines(model, waiting, folder, start, arguments.overwrite, has_bar=process == 0)
        return
    settings = checked_settings(given_settings(arguments))
    output_format, quality = settings["output_format"], settings["output_quality"]
    names = [f"{start}{i}.{output_format}" for i in range(settings["num_outputs"])]
    sheet = folder / f"{start}grid.{output_format}" if settings["output_grid"] else None
    check_folder(folder, [*names, *([sheet.name] if sheet else [])], arguments.overwrite)
    model = load_model(arguments)
    with LiveBar() as bar:
        result = model.generate(**drawing_settings(settings), on_progress=bar.listener())
    # Identical candidates are drawn once, so there may be fewer pictures than names.
    paths = [folder / name for name in names[: len(result.images)]]
    metadata = description(model, result, settings) if settings["output_metadata"] else None
    enlarge = enlarger(settings["output_size"], model.device)
    write_pictures(result, paths, metadata, output_format, quality, sheet, enlarge)
    if sheet:
        print(sheet)
    for path, score in zip(paths, result.scores, strict=True):
        print(f"{path}  score {score:.4f}")
    print(f"seed {result.seed}, model {model.config.name}, {time.monotonic() - started:.1f} seconds")


def load_model(arguments: argparse.Namespace) -> ClipGen:
    weights, reason = arguments.model, "the command names it"
    if not weights:
        weights, reason = default_model(os.environ.get("COG_WEIGHTS"))
    model = ClipGen.load(weights, arguments.device)
    log.info("model: %s from %s on %s: %s", model.config.name, shortened(weights), model.device, reason)
    return model


def read_lines(path: Path, settings: Mapping[str, object], fixed: Mapping[str, object] | None = None) -> list[Line]:
    """The lines of a file of prompts. ValueError for a bad one.

    settings: apply where a line has none. fixed: apply whatever a line has.
    """
    kinds = {"prompt": str} | {name: KINDS.get(name) or type(default) for name, default in DEFAULTS.items()}
    lines = []
    for number, values in read_prompts(path, kinds):
        try:
            lines.append(Line(number, checked_settings({**settings, **values, **(fixed or {})})))
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path}: holds no prompts")
    return lines


def given_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The prompt and the settings of the command, with defaults."""
    given = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    return DEFAULTS | PRESETS.get(arguments.preset, {}) | given | {"prompt": arguments.prompt}


def checked_settings(settings: dict[str, object]) -> dict[str, object]:
    """The same settings; ValueError if one is out of range."""
    check_number("output_quality", settings["output_quality"], 0, 100, whole=True)
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"{name} is {settings[name]!r}; give one of {', '.join(choices)}")
    check_request(**settings)
    for name in INPUT_PICTURES:
        if settings[name] is not None:
            open_picture(settings[name], name)  # an unusable one is refused before the model is loaded
    for sentence in without_effect(settings, DEFAULTS):
        log.warning(sentence)
    return settings
