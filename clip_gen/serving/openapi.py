"""The shape of the OpenAPI document Cog's generator emits, for one signature."""

from __future__ import annotations

from clip_gen.serving.inputs import InputField, Kind
from clip_gen.serving.signature import Signature

JSON_TYPES = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
# Input() arguments and what they are called in JSON Schema.
KEYWORDS = {
    "default": "default",
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "accept": "x-cog-accept",
}
# Components that every document has, whatever the inputs.
COMMON = {
    "Status": {
        "title": "Status",
        "description": "An enumeration.",
        "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
        "type": "string",
    },
    "HTTPValidationError": {
        "title": "HTTPValidationError",
        "type": "object",
        "properties": {
            "detail": {
                "title": "Detail",
                "type": "array",
                "items": {"$ref": "#/components/schemas/ValidationError"},
            }
        },
    },
    "ValidationError": {
        "title": "ValidationError",
        "required": ["loc", "msg", "type"],
        "type": "object",
        "properties": {
            "loc": {
                "title": "Location",
                "type": "array",
                "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            },
            "msg": {"title": "Message", "type": "string"},
            "type": {"title": "Error Type", "type": "string"},
        },
    },
}


def components_and_paths(signature: Signature, training: bool) -> tuple[dict[str, object], dict[str, object]]:
    """Half a document: what predicting or what training adds to it."""
    prefix, mode = ("Training", "train") if training else ("", "predict")
    kind = "Training" if training else "Prediction"
    components = {
        f"{prefix}Input": _input_component(f"{prefix}Input", signature.inputs),
        f"{prefix}Output": {"title": "Output", **_output_type(signature.output)},
        **{field.name: _enumeration(field) for field in signature.inputs if "choices" in field.arguments},
        **_envelopes(kind, f"{prefix}Input", f"{prefix}Output"),
        **COMMON,
    }
    return components, _paths(kind.lower(), mode)


def _input_component(title: str, fields: tuple[InputField, ...]) -> dict[str, object]:
    component: dict[str, object] = {"title": title, "type": "object"}
    required = [field.name for field in fields if field.required]
    if required:
        component["required"] = required
    component["properties"] = {field.name: _property(field, order) for order, field in enumerate(fields)}
    return component


def _property(field: InputField, order: int) -> dict[str, object]:
    given = field.arguments
    if "choices" in given:
        described = {"allOf": [{"$ref": f"#/components/schemas/{field.name}"}]}
    else:
        described = {"title": _title(field.name), **_json_type(field.kind)}
    described |= {keyword: _number(given[name]) for name, keyword in KEYWORDS.items() if name in given}
    if given.get("deprecated"):
        described["deprecated"] = True
    if field.kind.nullable:
        described["nullable"] = True
    return described | {"x-order": order}


def _enumeration(field: InputField) -> dict[str, object]:
    return {
        "title": field.name,
        "description": "An enumeration.",
        "enum": field.arguments["choices"],
        **JSON_TYPES[field.kind.name],
    }


def _json_type(kind: Kind) -> dict[str, object]:
    one = JSON_TYPES[kind.name]
    return {"type": "array", "items": dict(one)} if kind.is_list else dict(one)


def _output_type(output: Kind | dict[str, Kind]) -> dict[str, object]:
    if isinstance(output, Kind):
        return _json_type(output)
    properties = {}
    for name, kind in output.items():
        properties[name] = {"title": _title(name), **_json_type(kind)} | ({"nullable": True} if kind.nullable else {})
    required = [name for name, kind in output.items() if not kind.nullable]
    return {"type": "object", **({"required": required} if required else {}), "properties": properties}


def _number(value: object) -> object:
    """Whole floats as integers: that is how Cog's generator writes them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _title(name: str) -> str:
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _titled(name: str, **more: object) -> dict[str, object]:
    return {"title": _title(name), "type": "string", **more}


def _envelopes(kind: str, input_name: str, output_name: str) -> dict[str, object]:
    """What goes over the wire around the input and the output."""
    into = {"$ref": f"#/components/schemas/{input_name}"}
    times = {f"{name}_at": _titled(f"{name}_at", format="date-time") for name in ("created", "started", "completed")}
    texts = {name: _titled(name) for name in ("id", "version", "status", "error", "logs")}
    reply = {"input": into, "output": {"$ref": f"#/components/schemas/{output_name}"}, **texts, **times}
    reply["metrics"] = {"title": "Metrics", "type": "object"}
    bodies = {"Request": {"id": _titled("id"), "input": into}, "Response": reply}
    return {
        f"{kind}{name}": {"title": f"{kind}{name}", "type": "object", "properties": properties}
        for name, properties in bodies.items()
    }


def _paths(kind: str, mode: str) -> dict[str, object]:
    """The endpoints; kind is prediction or training."""
    anything, refused = _reply({}), {"422": _reply(_ref("HTTPValidationError"), "Validation Error")}
    request = {"content": {"application/json": {"schema": _ref(f"{kind.capitalize()}Request")}}}
    parameter = {"name": f"{kind}_id", "in": "path", "required": True, "schema": _titled(f"{kind}_id")}
    run = {
        "summary": mode.capitalize(),
        "description": f"Run a single {kind} on the model",
        "operationId": f"{mode}_{kind}s_post",
        "requestBody": request,
        "responses": {"200": _reply(_ref(f"{kind.capitalize()}Response")), **refused},
    }
    cancel = {
        "summary": "Cancel",
        "operationId": f"cancel_{kind}s__{kind}_id__cancel_post",
        "parameters": [parameter],
        "responses": {"200": anything, **refused},
    }
    root = {"summary": "Root", "operationId": "root__get", "responses": {"200": anything}}
    health = {"summary": "Healthcheck", "operationId": "healthcheck_health_check_get", "responses": {"200": anything}}
    return {
        "/": {"get": root},
        "/health-check": {"get": health},
        f"/{kind}s": {"post": run},
        f"/{kind}s/{{{kind}_id}}/cancel": {"post": cancel},
    }


def _reply(schema: dict[str, object], description: str = "Successful Response") -> dict[str, object]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, object]:
    return {"$ref": f"#/components/schemas/{name}"}
