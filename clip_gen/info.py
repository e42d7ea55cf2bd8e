"""The command `python -m clip_gen info`: prints the command that draws a picture again, and what it needs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

from clip_gen.enlarging import LANCZOS
from clip_gen.files import checkpoints_folder
from clip_gen.generate import DEFAULTS
from clip_gen.images import read_metadata
from clip_gen.picture_files import INPUT_PICTURES
from clip_gen.weights.model_folder import CONFIG, ModelFolderError, folder_sha256, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", type=Path, help="a picture that this program drew, with its metadata")


def main(arguments: argparse.Namespace) -> None:
    found = read_metadata(arguments.picture)
    if not {"seed", "model", "num_outputs"} <= found.keys():
        raise ValueError(f"{arguments.picture} has no settings of this program; it was drawn elsewhere or without them")
    folder = find_model(found)
    print(shell_command(found, str(folder or "MODEL")))
    hint = "" if folder else "; put its folder, tar or URL in place of MODEL"
    print(f"model: {found['model']}, sha256 {found.get('model_sha256', 'not recorded')}{hint}")
    for name in INPUT_PICTURES:
        if f"{name}_sha256" in found:
            print(f"{name}: sha256 {found[f'{name}_sha256']}; put its file in place of {name.upper()}")
    if "upscaler" in found:
        by = (
            "Lanczos interpolation" if found["upscaler"] == LANCZOS else f"the upscaler with sha256 {found['upscaler']}"
        )
        print(f"enlarged to {found['output_size']} by {by}")
    if "number" in found:
        print(f"this picture: number {found['number']} of {found['num_outputs']}, score {found['score']}")
    if "torch" in found:
        print(f"drawn with torch {found['torch']} on {found['device']}")


def shell_command(found: Mapping[str, str], model: str) -> str:
    """The command that draws the pictures of these settings."""
    words = ["python", "-m", "clip_gen", "generate", f"--model={model}"]
    pictures = [name for name in INPUT_PICTURES if f"{name}_sha256" in found]
    words += [f"--{name.replace('_', '-')}={name.upper()}" for name in pictures]
    for name, default in DEFAULTS.items():
        option, value = name.replace("_", "-"), found.get(name)
        if isinstance(default, bool) and value:
            words.append(f"--{option}" if value == "True" else f"--no-{option}")
        elif value:
            words.append(f"--{option}={value}")
    words += [f"--device={found['device']}"] if "device" in found else []
    words += ["--", found["prompt"]] if "prompt" in found else []
    dtype = f"CLIP_GEN_DTYPE={shlex.quote(found['dtype'])} " if "dtype" in found else ""
    return dtype + shlex.join(words)


def find_model(found: Mapping[str, str]) -> Path | None:
    """The model folder in checkpoints/ that the picture was drawn with, by its hash."""
    for config in sorted(checkpoints_folder().glob(f"*/{CONFIG}")):
        try:
            is_named_so = load_config(config.parent).name == found["model"]
            if is_named_so and folder_sha256(config.parent) == found.get("model_sha256"):
                return config.parent
        except (ModelFolderError, OSError):  # another folder that is incomplete
            continue
    return None
