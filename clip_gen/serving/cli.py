"""What `cog predict` does, in this process and without Docker: inputs as text in, picture files out."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import mimetypes
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from clip_gen.files import PARTIAL, ROOT, is_writable, set_compile_cache_folders
from clip_gen.serving.inputs import InputError, InputField, checked
from clip_gen.serving.schema import PREDICT, project_signatures
from clip_gen.validation import check_request

PREDICTS = (
    "script/predict",
    "Draws pictures of a prompt and writes them as output.0.png, output.1.png, ..., best first.",
    'script/predict -i prompt="a large red circle" -i seed=7',
    "name of the files, or a folder for them; a suffix sets the format",
)
FORMATS = {"png": "png", "webp": "webp", "jpg": "jpg", "jpeg": "jpg"}


def main(arguments: Sequence[str]) -> int:
    """Runs one prediction. 1 and a sentence on stderr when an input or the model will not do; 130 after Ctrl-C."""
    started = time.monotonic()
    set_compile_cache_folders()
    try:
        fields = project_signatures()[0].inputs
        options = parse_options(arguments, fields, PREDICTS)
        os.environ.update(named(options.env, "-e"))
        target, suffix = output_target(options.output)
        texts = named(options.input, "-i")
        if suffix:
            texts.setdefault("output_format", suffix)
        values = checked(parse_inputs(texts, fields), fields)
        if suffix and values["output_format"] != suffix:
            raise InputError(f"-o {options.output} asks for {suffix}, but output_format is {values['output_format']}")
        check_request(**values)
        paths = output_paths(target, values["num_outputs"], values["output_format"])
        metrics = _predict(values, paths)
        # Identical candidates are drawn once, so there may be fewer pictures than paths.
        for path, score in zip(paths, metrics["scores"], strict=False):
            print(f"{path}  score {score:.4f}")
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"seed {metrics['seed']}, model {metrics['model']}, {time.monotonic() - started:.1f} seconds")
    return 0


def parse_inputs(texts: dict[str, str], fields: Sequence[InputField]) -> dict[str, object]:
    """The texts of the command line as the types the fields want; what cannot be read stays text and is refused later.

    `@file` gives what the file says. Nothing after the `=` leaves an input out that may be left out.
    """
    known = {field.name: field for field in fields}
    values: dict[str, object] = {}
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is no UTF-8 text; say it in the characters of a terminal set to UTF-8") from error
        field = known.get(name)
        if field and field.kind.nullable and not text:
            values[name] = None
            continue
        if field and field.kind.name == "Path":
            if not text.removeprefix("@"):
                raise InputError(f"{name} is empty; give the name of a file")
            values[name] = Path(os.path.expanduser(text.removeprefix("@")))
            continue
        if text.startswith("@"):
            text = _file_input(name, Path(os.path.expanduser(text[1:])), named=bool(field) and field.kind.nullable)
        elif len(text) > 1 and text[0] == text[-1] == '"':
            text = text[1:-1]  # as `cog predict` does
        values[name] = _parse_value(text, field and field.kind.name)
    return values


def _parse_value(text: str, kind: str | None) -> object:
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    with contextlib.suppress(ValueError):
        if kind == "int" and re.fullmatch(r"[+-]?\d+", text):
            return int(text)
        if kind in ("int", "float"):
            return float(text)
    return text


def _file_input(name: str, path: Path, named: bool) -> str:
    """What the file says; its path when it is no text and the input may be `named`, as weights are."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        if named:
            return str(path)
        raise InputError(f"{name}: {path} is no UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{name}: {path} cannot be read ({error.strerror}); give the name of a file") from error
    if not text:
        raise InputError(f"{name}: {path} is empty; give a file with something in it, or leave {name} out")
    return text


def output_target(output: str | None) -> tuple[Path, str | None]:
    """Where the files go, as a path still without number and suffix, and the format its suffix asks for, if any."""
    path = Path(os.path.expanduser(output or "output"))
    if output and output.endswith("/") and not path.is_dir():
        raise InputError(f"-o {output}: there is no such folder; create it or choose another")
    if output and path.is_dir():
        path = path / "output"
    folder = path.parent
    if not (folder.is_dir() and is_writable(folder)):
        shown = f"-o {output}: {folder}" if output else folder.absolute()
        raise InputError(f"{shown} is no folder that can be written to; create it or choose another")
    suffix = FORMATS.get(path.suffix[1:].lower())
    if suffix is None and (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
        raise InputError(f"-o {output}: {path.suffix} is not written here; give .png, .webp or .jpg")
    return (path.with_suffix("") if suffix else path), suffix


def output_paths(target: Path, count: int, suffix: str) -> list[Path]:
    """target.0.png, target.1.png, ...; InputError when something lies there that is no picture of an earlier run."""
    paths = [target.with_name(f"{target.name}.{i}.{suffix}") for i in range(count)]
    for path in paths:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: is there already and no plain file; move it or choose another -o")
    return paths


def parse_options(
    arguments: Sequence[str], fields: Sequence[InputField], words: tuple[str, str, str, str]
) -> argparse.Namespace:
    """-i, -e and -o. words: the command, what it does, an example, what -o names. SystemExit(1) when it is misused."""
    command, purpose, example, output = words
    width = max(len(field.name) for field in fields)
    described = [f"  {field.name:<{width}}  {field.arguments['description']} [{_limits(field)}]" for field in fields]
    parser = argparse.ArgumentParser(
        prog=command,
        description=purpose,
        epilog="\n".join(["inputs:", *described, "", f"example: {example}"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-i", "--input", action="append", default=[], metavar="NAME=VALUE", help="an input; @FILE reads it from a file")
    add(
        "-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="an environment variable, as COG_WEIGHTS"
    )
    add("-o", "--output", metavar="PATH", help=output)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as exit:
        if exit.code:  # argparse leaves with 2
            raise SystemExit(1) from exit
        raise
    if options.output == "":
        raise InputError(f"-o is empty; give the {output.partition(';')[0]}")
    return options


def _limits(field: InputField) -> str:
    default = field.arguments.get("default")
    if default in (None, ""):
        return field.wanted() + ("; required" if field.required else "")
    return f"{field.wanted()}; default {str(default).lower() if isinstance(default, bool) else default}"


def named(pairs: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise InputError(f"{option} {pair}: write it as name=value")
        if option == "-i" and name in named:
            raise InputError(f"{name} is given twice; give it once")
        named[name] = value
    return named


def _predict(values: dict[str, object], paths: Sequence[Path]) -> dict[str, object]:
    """Writes the files of one prediction, no more than there are paths, and returns what the predictor recorded; what
    it prints goes to stderr.
    """
    predictor = _predict_module().Predictor()
    metrics: dict[str, object] = {}
    # Outside a server nobody receives the metrics.
    predictor.record_metric = metrics.__setitem__

    async def run() -> list[Path]:
        await predictor.setup(os.environ.get("COG_WEIGHTS") or None)
        predictor.models.rules = None  # they are for strangers' requests
        return await predictor.run(**values)

    with contextlib.redirect_stdout(sys.stderr):
        files = asyncio.run(run())
    _deliver(files, paths[: len(files)])  # while the predictor lives: its folder of pictures goes with it
    return metrics


def _predict_module() -> ModuleType:
    """predict.py of this project, wherever the caller stands."""
    spec = importlib.util.spec_from_file_location("predict", ROOT / PREDICT[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _deliver(files: Sequence[Path], paths: Sequence[Path]) -> None:
    """Copies the files to these paths, all of them or, when one cannot be written, none: then all is as before."""
    path = paths[0]
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=PARTIAL) as folder, contextlib.ExitStack() as undo:
            for path, file in zip(paths, files, strict=True):
                shutil.copyfile(file, Path(folder, path.name))
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
