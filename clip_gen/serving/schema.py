"""The OpenAPI document Cog would build from predict.py and train.py, made without Cog's command line or Docker.

`python -m clip_gen.serving.schema` writes it where the server looks for it, .cog/openapi_schema.json. Without that file
the server checks no request at all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

from clip_gen.files import ROOT, write_text_atomic
from clip_gen.serving.openapi import COMMON, components_and_paths
from clip_gen.serving.signature import Signature, SignatureError, read_signature

PREDICT = ("predict.py", "Predictor")
TRAIN = ("train.py", "train")
SCHEMA_PATH = Path(".cog/openapi_schema.json")
RESERVED = {
    *COMMON,
    *("Input", "Output", "PredictionRequest", "PredictionResponse"),
    *("TrainingInput", "TrainingOutput", "TrainingRequest", "TrainingResponse"),
}


def build_schema(root: Path = ROOT) -> dict[str, object]:
    """The whole document for the project at `root`. SignatureError lists what Cog would misread in it."""
    predict, train = project_signatures(root)
    components, paths = components_and_paths(predict, training=False)
    if train is not None:
        more_components, more_paths = components_and_paths(train, training=True)
        components, paths = more_components | components, more_paths | paths
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": importlib.metadata.version("cog")},
        "paths": paths,
        "components": {"schemas": components},
    }


def project_signatures(root: Path = ROOT) -> tuple[Signature, Signature | None]:
    """What the project at `root` predicts and, if it has a train.py, trains."""
    predict = read_signature(root / PREDICT[0], PREDICT[1])
    train = read_signature(root / TRAIN[0], TRAIN[1]) if (root / TRAIN[0]).exists() else None
    problems = _name_clashes(_choices(predict), _choices(train) if train else {})
    if train and predict.slots > 1 and not train.is_async:
        # One image serves both, with the number of slots baked in from predict.
        problems.append(f"{TRAIN[0]}: {predict.slots} slots at once need `async def {TRAIN[1]}`")
    if problems:
        raise SignatureError("\n".join(problems))
    return predict, train


def write_schema(root: Path = ROOT) -> Path:
    """Writes the document whole or not at all, unless it is there, and returns its path."""
    text = json.dumps(build_schema(root), indent=2, ensure_ascii=False) + "\n"
    path = root / SCHEMA_PATH
    if not path.is_file() or path.read_text(encoding="utf-8") != text:  # the project's folder may be read-only
        path.parent.mkdir(exist_ok=True)
        write_text_atomic(path, text)
    return path


def _name_clashes(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """An input with choices becomes a component of its own name, and all components share one space."""
    found = [
        f"{name}: predict and train have it with different choices, and train would get predict's; rename one"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    return found + [
        f"{name}: an input with choices may not have the name of one of Cog's own components; rename it"
        for name in {**ours, **theirs}
        if name in RESERVED
    ]


def _choices(signature: Signature) -> dict[str, object]:
    return {field.name: field.arguments["choices"] for field in signature.inputs if "choices" in field.arguments}


def main(arguments: list[str]) -> int:
    """Writes the document of this project; 1 and the problems on stderr when Cog would misread it."""
    parser = argparse.ArgumentParser(prog="python -m clip_gen.serving.schema", description=main.__doc__)
    parser.add_argument("--print-slots", action="store_true", help="print how many predictions may run at once")
    options = parser.parse_args(arguments)
    try:
        write_schema()
        predict, _ = project_signatures()
    except (SignatureError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.print_slots:
        print(predict.slots)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
