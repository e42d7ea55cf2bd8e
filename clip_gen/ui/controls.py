"""The components for the settings of a request, made from the inputs of predict.py, so that none is missing."""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr

from clip_gen.files import ROOT
from clip_gen.serving.inputs import InputField, checked

# Inputs that the page has a place of its own for, and `replicate_weights`, for which it has the choice of a model.
OWN_PLACE = ("prompt", "image", "replicate_weights")
FIRST = ("num_outputs", "candidates", "seed")
ADVANCED = {
    "Choice of tokens": ("guidance", "temperature", "top_k", "top_p", "clip_rerank"),
    "Files": ("output_size", "output_format", "output_quality", "output_grid", "output_metadata"),
}
STEPS = {"temperature": 0.05, "guidance": 0.1}  # of sliders; others 1 or 0.01
LABELS = {"num_outputs": "Pictures", "clip_rerank": "Choose by CLIP score"}  # others: the input's name
TYPED = ("seed", "top_k")  # numbers with a range too large for a slider


def read_fields() -> dict[str, InputField]:
    """The inputs of predict.py."""
    return runpy.run_path(str(ROOT / "predict.py"))["INPUTS"]


def component(field: InputField) -> gr.components.Component:
    """The component for an input, with its description and limits."""
    info, kind = field.info, field.kind
    common = {
        "label": LABELS.get(field.name) or field.name.replace("_", " ").capitalize(),
        "info": info.description,
        "value": info.default,
    }
    common["elem_id"] = field.name
    if info.choices:
        return gr.Radio(info.choices, **common)
    if kind is bool:
        return gr.Checkbox(**common)
    if kind is str:
        return gr.Textbox(max_length=info.max_length, max_lines=3, **common)
    if field.name in TYPED:
        # No minimum, which would stand there in place of an empty value. The request is checked anyway.
        return gr.Number(precision=0, placeholder="random" if field.nullable else None, **common)
    step = STEPS.get(field.name, 1 if kind is int else 0.01)
    return gr.Slider(info.ge, info.le, step=step, buttons=[], **common)


def as_settings(fields: Mapping[str, InputField], names: Sequence[str], values: Sequence[object]) -> dict[str, object]:
    """The settings of a request for the values of components. InputError lists all problems."""
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    given = {name: Path(value) if name == "image" else value for name, value in given.items()}
    settings = checked(fields, **given)
    settings.pop("replicate_weights")
    return settings


def as_values(fields: Mapping[str, InputField], names: Sequence[str], settings: Mapping[str, object]) -> list[object]:
    """The values of components that show these settings; the default for those without."""
    return [settings.get(name, fields[name].info.default) for name in names]
