"""The OpenAPI document that Cog's generator would write for predict.py and train.py, made without Docker.

`python -m clip_gen.serving.openapi` writes it to .cog/openapi_schema.json and prints how many predictions run at once.
Cog's server checks no request without that file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cog

from clip_gen.files import ROOT, write_text_atomic
from clip_gen.serving.inputs import InputField, read_inputs

SCHEMA_PATH = Path(".cog/openapi_schema.json")
TEMPLATE = Path(__file__).with_name("openapi.json")  # what is the same for all models
JSON_TYPES = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    cog.Path: {"type": "string", "format": "uri"},
}


def load_module(path: Path) -> ModuleType:
    """predict.py or train.py, whatever the current folder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_schema(root: Path = ROOT) -> dict[str, object]:
    """The document for the predict.py and train.py in a folder."""
    document = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    document["info"]["version"] = importlib.metadata.version("cog")
    schemas = document["components"]["schemas"]
    run, train = load_module(root / "predict.py").Predictor.run, load_module(root / "train.py").train
    for prefix, function in (("", run), ("Training", train)):
        fields = read_inputs(function).values()
        schemas[f"{prefix}Input"] = {"title": f"{prefix}Input", **_input_schema(fields)}
        schemas[f"{prefix}Output"] = {"title": "Output", **_output_schema(function)}
        for field in fields:
            if field.info.choices:
                values = {"enum": field.info.choices, **JSON_TYPES[field.kind]}
                schemas[field.name] = {"title": field.name, "description": "An enumeration.", **values}
    return document


def write_schema() -> None:
    """Writes this project's document, unless it is there already: the project's folder may be read-only."""
    text = json.dumps(build_schema(), indent=2, ensure_ascii=False) + "\n"
    path = ROOT / SCHEMA_PATH
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        write_text_atomic(path, text)


def _input_schema(fields: typing.Iterable[InputField]) -> dict[str, object]:
    required = [field.name for field in fields if field.required]
    properties = {field.name: _property(field) | {"x-order": order} for order, field in enumerate(fields)}
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _property(field: InputField) -> dict[str, object]:
    info = field.info
    if info.choices:
        described = {"allOf": [{"$ref": f"#/components/schemas/{field.name}"}]}
    else:
        described = {"title": _title(field.name), **JSON_TYPES[field.kind]}
    limits = {
        "description": info.description,
        "default": info.default,
        "minimum": info.ge,
        "maximum": info.le,
        "minLength": info.min_length,
        "maxLength": info.max_length,
        "x-cog-accept": info.accept,
    }
    described |= {name: _number(value) for name, value in limits.items() if value is not None}
    return described | ({"nullable": True, "default": info.default} if field.nullable else {})


def _output_schema(function: Callable[..., object]) -> dict[str, object]:
    output = typing.get_type_hints(function)["return"]
    if typing.get_origin(output) is list:
        return {"type": "array", "items": JSON_TYPES[typing.get_args(output)[0]]}
    fields = typing.get_type_hints(output)  # a cog.BaseModel
    properties = {name: {"title": _title(name), **JSON_TYPES[kind]} for name, kind in fields.items()}
    return {"type": "object", "required": list(fields), "properties": properties}


def _number(value: object) -> object:
    """Whole floats as integers, as Cog's generator writes them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _title(name: str) -> str:
    return " ".join(word.capitalize() for word in name.split("_"))


if __name__ == "__main__":
    write_schema()
    print(load_module(ROOT / "predict.py").Predictor.run.__cog_concurrent_max__)
