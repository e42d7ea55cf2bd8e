"""The OpenAPI document that Cog's generator would write for predict.py and train.py, made without Docker.

Cog's server reads it from .cog/openapi_schema.json, and checks no request without that file.
"""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import typing
from pathlib import Path

import cog

from clip_gen.files import ROOT
from clip_gen.serving.inputs import InputField, read_inputs

TEMPLATE = Path(__file__).with_name("openapi.json")  # what is the same for all models
JSON_TYPES = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    cog.Path: {"type": "string", "format": "uri"},
}


def build_schema(root: Path = ROOT) -> dict[str, object]:
    """The document for the predict.py and train.py in a folder."""
    document = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    document["info"]["version"] = importlib.metadata.version("cog")
    schemas = document["components"]["schemas"]
    run = runpy.run_path(str(root / "predict.py"))["Predictor"].run
    train = runpy.run_path(str(root / "train.py"))["train"]
    for prefix, function in (("", run), ("Training", train)):
        fields = read_inputs(function).values()
        schemas[f"{prefix}Input"] = {
            "title": f"{prefix}Input",
            "type": "object",
            "properties": {field.name: _property(field) | {"x-order": order} for order, field in enumerate(fields)},
            "required": [field.name for field in fields if field.required],
        }
        schemas[f"{prefix}Output"] = {"title": "Output", **_output(typing.get_type_hints(function)["return"])}
        for field in fields:
            if field.info.choices:
                values = {"enum": field.info.choices, **JSON_TYPES[field.kind]}
                schemas[field.name] = {"title": field.name, "description": "An enumeration.", **values}
    return document


def _property(field: InputField) -> dict[str, object]:
    info = field.info
    if info.choices:
        described = {"allOf": [{"$ref": f"#/components/schemas/{field.name}"}]}
    else:
        described = {"title": field.name.replace("_", " ").title(), **JSON_TYPES[field.kind]}
    limits = {
        "description": info.description,
        "default": info.default,
        "minimum": info.ge,
        "maximum": info.le,
        "minLength": info.min_length,
        "maxLength": info.max_length,
        "x-cog-accept": info.accept,
    }
    described |= {name: value for name, value in limits.items() if value is not None}
    return described | ({"nullable": True, "default": info.default} if field.nullable else {})


def _output(kind: type) -> dict[str, object]:
    if typing.get_origin(kind) is list:
        return {"type": "array", "items": JSON_TYPES[typing.get_args(kind)[0]]}
    fields = typing.get_type_hints(kind)  # a cog.BaseModel
    properties = {name: {"title": name.replace("_", " ").title(), **JSON_TYPES[kind]} for name, kind in fields.items()}
    return {"type": "object", "required": list(fields), "properties": properties}
