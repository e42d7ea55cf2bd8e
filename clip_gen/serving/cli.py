"""script/predict and script/train: `cog predict` and `cog train` without Docker.

They read inputs as Cog's command line does, and then run the commands `generate` and `train`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import mimetypes
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_gen.files import ROOT, is_writable, set_compile_cache_folders
from clip_gen.serving.inputs import InputError, InputField, checked
from clip_gen.serving.openapi import load_module
from clip_gen.serving.train_process import SIGNALS, TrainingFailed, as_options, run_training
from clip_gen.weights.url import is_url

FORMATS = {"png": "png", "webp": "webp", "jpg": "jpg", "jpeg": "jpg"}


def predict(arguments: Sequence[str]) -> int:
    """Draws with the command `generate`."""
    fields = load_module(ROOT / "predict.py").INPUTS
    options = parse_options(
        arguments,
        fields,
        command="script/predict",
        purpose="Draws pictures of a prompt and writes them as output.0.png, output.1.png, ..., best first.",
        example='script/predict -i prompt="a large red circle" -i seed=7',
        output="name of the files, or a folder for them; a suffix sets the format",
    )
    path, suffix = output_target(options.output)
    default_format = {"output_format": suffix} if suffix else {}
    values = checked(fields, **parse_inputs(default_format | options.input, fields))
    if suffix and values["output_format"] != suffix:
        raise InputError(f"-o {options.output} asks for {suffix}, but output_format is {values['output_format']}")
    prompt, weights = values.pop("prompt"), values.pop("replicate_weights")
    files = {"model": weights or None, "out": path.parent, "name": path.name, "overwrite": True}

    from clip_gen import generate  # loads torch

    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    generate.main(parser.parse_args([*as_options(values | files), "--", prompt]))
    return 0


def train(arguments: Sequence[str]) -> int:
    """Trains with the command `train`, in a process of its own."""
    fields = load_module(ROOT / "train.py").INPUTS
    options = parse_options(
        arguments,
        fields,
        command="script/train",
        purpose="Trains on a zip, a tar or a folder of pictures without captions and leaves trained/weights.tar, for "
        "script/predict -e COG_WEIGHTS=trained/weights.tar.",
        example="script/train -i images=@photos.zip",
        output="folder for the weights, `trained` by default; the same command started again resumes the training",
    )
    if is_url(options.input.get("images", "").removeprefix("@")):
        raise InputError(f"images is {options.input['images']}; download it first, and give the file or folder")
    values = checked(fields, **parse_inputs(options.input, fields))
    images, out = Path(values["images"]).absolute(), Path(options.output or "trained").absolute()
    if not images.exists():
        raise InputError(f"images is {images}: no such file; give a zip, a tar or a folder of pictures")
    try:
        asyncio.run(run_training(values | {"images": images}, out, shlex.join(["script/train", *arguments])))
    except TrainingFailed as error:
        # The training has printed any other reason.
        if error.status > 128 and error.status - 128 not in SIGNALS:
            print(f"{error}; the same command resumes from the last checkpoint", file=sys.stderr)
        return error.status
    print(out / "weights.tar")
    return 0


def parse_options(
    arguments: Sequence[str], fields: Mapping[str, InputField], command: str, purpose: str, example: str, output: str
) -> argparse.Namespace:
    """Reads -i, -e and -o, and sets the environment variables of -e. SystemExit(1) for unknown arguments.

    Returns `input`, a mapping, and `output`.
    """
    width = max(map(len, fields))
    described = [f"  {name:<{width}}  {field.info.description} [{_limits(field)}]" for name, field in fields.items()]
    parser = argparse.ArgumentParser(
        prog=command,
        description=purpose,
        epilog="\n".join(["inputs:", *described, "", f"example: {example}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pair = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("-i", "--input", help="an input; NAME=@FILE reads it from a file", **pair)
    parser.add_argument("-e", "--env", help="an environment variable, such as COG_WEIGHTS", **pair)
    parser.add_argument("-o", "--output", metavar="PATH", help=output)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as exit:
        raise SystemExit(1 if exit.code else 0) from exit  # argparse exits with 2
    if options.output == "":
        raise InputError(f"-o is empty; give the {output.partition(';')[0]}")
    os.environ.update(split_pairs(options.env, "-e"))
    options.input = split_pairs(options.input, "-i")
    return options


def _limits(field: InputField) -> str:
    default = field.info.default
    if default in (None, ""):
        return field.allowed() + ("; required" if field.required else "")
    return f"{field.allowed()}; default {str(default).lower() if isinstance(default, bool) else default}"


def split_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"{option} {pair}: write it as name=value")
        if option == "-i" and name in values:
            raise InputError(f"{name} is given twice; give it once")
        values[name] = value
    return values


def parse_inputs(texts: Mapping[str, str], fields: Mapping[str, InputField]) -> dict[str, object]:
    return {name: parse_input(name, text, fields.get(name)) for name, text in texts.items()}


def parse_input(name: str, text: str, field: InputField | None) -> object:
    """One text of the command line in its input's type. Text that does not fit stays text, and checked() refuses it.

    `@file` stands for the text in that file. An empty text leaves an optional input out.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not UTF-8 text; use a terminal set to UTF-8") from error
    if field and field.nullable and not text:
        return None
    if field and issubclass(field.kind, Path):
        if not text.removeprefix("@"):
            raise InputError(f"{name} is empty; give the name of a file")
        return Path(os.path.expanduser(text.removeprefix("@")))
    if text.startswith("@"):
        text = read_text(name, Path(os.path.expanduser(text[1:])), or_path=bool(field) and field.nullable)
    elif len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]  # as `cog predict` does
    if field and field.kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text) if field and field.kind in (int, float) else text
    except ValueError:
        return text


def read_text(name: str, path: Path, or_path: bool) -> str:
    """The text in a file. or_path: the path itself for a file that is not text, such as weights."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        if or_path:
            return str(path)
        raise InputError(f"{name}: {path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{name}: {path} cannot be read ({error.strerror}); give the name of a file") from error
    if not text:
        raise InputError(f"{name}: {path} is empty; give a file with text, or leave {name} out")
    return text


def output_target(output: str | None) -> tuple[Path, str | None]:
    """Folder and name of the files that -o asks for, without number and suffix, and the format if it has a suffix."""
    path = Path(os.path.expanduser(output or "output"))
    if output and output.endswith("/") and not path.is_dir():
        raise InputError(f"-o {output}: there is no such folder; create it or choose another")
    if output and path.is_dir():
        path = path / "output"
    folder = path.parent
    if not (folder.is_dir() and is_writable(folder)):
        shown = f"-o {output}: {folder}" if output else folder.absolute()
        raise InputError(f"{shown} is not a folder that can be written to; create it or choose another")
    suffix = FORMATS.get(path.suffix[1:].lower())
    if suffix is None and (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
        raise InputError(f"-o {output}: {path.suffix} is not supported; give .png, .webp or .jpg")
    return (path.with_suffix("") if suffix else path), suffix


def main(arguments: Sequence[str]) -> int:
    """Runs `predict` or `train`, the first argument. Returns 1 after an error in one sentence, 130 after Ctrl-C."""
    set_compile_cache_folders()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return predict(arguments[1:]) if arguments[0] == "predict" else train(arguments[1:])
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
