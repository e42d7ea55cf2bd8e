"""script/predict and script/train: the commands `generate` and `train`, with inputs as on Cog's command line."""

from __future__ import annotations

import argparse
import mimetypes
import os
import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cog

from clip_gen.data.entries import reason_of
from clip_gen.data.sources import URL
from clip_gen.files import COMMAND, ROOT
from clip_gen.serving.inputs import InputError, InputField, checked
from clip_gen.serving.train_process import TRAIN_ENVIRONMENT, as_options, train_words

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}


def command_words(command: str, arguments: Sequence[str]) -> list[str]:
    """The words after `python -m clip_gen` for the arguments of script/predict or script/train.

    Sets their environment variables. InputError for inputs that do not fit.
    """
    fields = runpy.run_path(str(ROOT / f"{command}.py"))["INPUTS"]
    options = option_parser(command, fields).parse_args(arguments)
    if options.output == "":
        raise InputError("-o is empty; give a name or a folder")
    os.environ.update(split_pairs(options.env, "-e"))
    texts = split_pairs(options.input, "-i")
    inputs = {name: parse_input(fields[name], text) if name in fields else text for name, text in texts.items()}
    if command == "train":
        os.environ.update(TRAIN_ENVIRONMENT | os.environ | {COMMAND: shlex.join(["script/train", *arguments])})
        values = checked(fields, **inputs)
        if URL.match(texts["images"]):
            values["images"] = texts["images"]  # a Path makes http:/ of http://
        words = train_words(values, options.output or "trained")
        return [*words, "--dry-run"] if options.dry_run else words
    return generate_words(inputs, fields, options.output or "output")


def generate_words(inputs: Mapping[str, object], fields: Mapping[str, InputField], output: str) -> list[str]:
    """The words after `python -m clip_gen` that draw. output: the files' name without number, or their folder."""
    path = Path(os.path.expanduser(output))
    if path.is_dir() or output.endswith("/"):
        path = path / "output"
    output_format = FORMATS.get(path.suffix.lower())
    if output_format is None and (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
        raise InputError(f"-o {output}: {path.suffix} is not supported; give .png, .webp or .jpg")
    values = checked(fields, **({"output_format": output_format} if output_format else {}) | inputs)
    if output_format not in (None, values["output_format"]):
        raise InputError(f"-o {output} asks for {output_format}, but output_format is {values['output_format']}")
    prompt, weights = values.pop("prompt"), values.pop("replicate_weights")
    values |= {"model": weights, "out": path.parent, "name": path.stem if output_format else path.name}
    return ["generate", "--overwrite", *as_options(values), "--", prompt]


def option_parser(command: str, fields: Mapping[str, InputField]) -> argparse.ArgumentParser:
    inputs = [f"  {name:<25}  {field.info.description} [{field.limits()}]" for name, field in fields.items()]
    parser = argparse.ArgumentParser(
        prog=f"script/{command}",
        description=f"Runs `python -m clip_gen {'generate' if command == 'predict' else 'train'}` with Cog's inputs.",
        epilog="\n".join(["inputs:", *inputs]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    output = "predict: the files' name, whose suffix sets the format, or their folder; train: the training's folder"
    pair = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("-i", "--input", help="an input; NAME=@FILE reads it from a file", **pair)
    parser.add_argument("-e", "--env", help="an environment variable, such as COG_WEIGHTS", **pair)
    parser.add_argument("-o", "--output", metavar="PATH", help=output)
    if command == "train":
        parser.add_argument("--dry-run", action="store_true", help="say what to expect, and stop there")
    return parser


def split_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"{option} {pair}: write it as name=value")
        if name in values:
            several = ", with a text file of several paths, one a line" if name == "images" else ""
            raise InputError(f"{name} is given twice; give it once{several}")
        values[name] = value
    return values


def parse_input(field: InputField, text: str) -> object:
    """One text of the command line in its input's type. Text that does not fit stays text, and checked() refuses it.

    `@file` stands for the text in that file, or for the file itself if the input is one. An empty text leaves an
    optional input out.
    """
    if field.nullable and not text:
        return None
    if field.kind is cog.Path or (field.kind is str and field.nullable):
        path = os.path.expanduser(text.removeprefix("@"))
        return Path(path) if path and field.kind is cog.Path else path
    if text.startswith("@"):
        text = read_text(field.name, os.path.expanduser(text[1:]))
    elif len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]  # as `cog run` does
    if field.kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text) if field.kind in (int, float) else text
    except ValueError:
        return text


def read_text(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: {path} cannot be read ({reason_of(error)}); give a text file in UTF-8") from error


def main(command: str, arguments: Sequence[str]) -> None:
    """Replaces this process by `python -m clip_gen generate` or `train`. Exits with 1 after a sentence on errors."""
    try:
        words = command_words(command, arguments)
    except InputError as error:
        sys.exit(str(error))
    os.execv(sys.executable, [sys.executable, "-m", "clip_gen", *words])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
