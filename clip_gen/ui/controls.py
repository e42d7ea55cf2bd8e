"""The components for the settings of a request, made from the inputs of predict.py, so that none is missing."""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image, ImageChops

from clip_gen.files import ROOT
from clip_gen.images import resized_square
from clip_gen.picture_files import INPUT_PICTURES
from clip_gen.serving.inputs import InputField, checked

FIRST = ("num_outputs", "candidates", "seed")
ADVANCED = {
    "Choice of tokens": ("guidance", "temperature", "top_k", "top_p", "clip_rerank"),
    "Files": ("output_size", "output_format", "output_quality", "output_grid", "output_metadata"),
}
STEPS = {"temperature": 0.05, "guidance": 0.1}  # of sliders; others 1 or 0.01
LABELS = {"num_outputs": "Pictures", "clip_rerank": "Choose the best"}  # others: the input's name
CANVAS = 384  # pixels of the square on which a mask is painted
BRUSH = "#ff00ff"
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


def picture_input(name: str) -> gr.Image:
    """The component for an input that is a picture. It gives the file as it is, so that its hash is the file's."""
    label, sources = f"{name.replace('_', ' ').capitalize()}: upload or paste", ["upload", "clipboard"]
    common = {"type": "filepath", "image_mode": None, "height": 220, "buttons": []}
    return gr.Image(label=label, sources=sources, elem_id=name, **common)


def as_settings(
    fields: Mapping[str, InputField], names: Sequence[str], values: Sequence[object], folder: Path
) -> dict[str, object]:
    """The settings of a request for the values of components. InputError lists all problems.

    folder: where to write the mask that was painted.
    """
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    given["mask"] = painted(given.pop("mask", None), folder / "mask.png") if "init_image" in given else None
    given |= {name: Path(given[name]) for name in INPUT_PICTURES if given.get(name)}
    settings = checked(fields, **given)
    settings.pop("replicate_weights")
    return settings


def painted(editor: Mapping[str, object] | None, path: Path) -> Path | None:
    """Writes the mask of an ImageEditor's value: white where a layer is painted. None if nothing is."""
    mask = None
    for layer in (editor or {}).get("layers", ()):
        opacity = layer.convert("RGBA").getchannel("A").point(lambda level: 255 * (level > 127))
        mask = opacity if mask is None else ImageChops.lighter(mask, opacity)
    if mask is None or not mask.getbbox():
        return None
    mask.save(path)
    return path


def canvas(picture: Image.Image, mask: Image.Image | None = None) -> dict[str, object]:
    """The value of an ImageEditor that shows the central square of a picture, with a mask painted on it."""
    shown = resized_square(picture, CANVAS)
    layer = Image.new("RGBA", shown.size)
    if mask:
        layer.paste(BRUSH, mask=mask.resize(shown.size, Image.Resampling.NEAREST).convert("L"))
    composite = Image.alpha_composite(shown.convert("RGBA"), layer)
    return {"background": shown, "layers": [layer] if mask else [], "composite": composite}


def half_mask(half: str) -> Image.Image:
    """A mask of the `upper`, `lower`, `left` or `right` half, or of `all`."""
    middle = CANVAS // 2
    boxes = {"upper": (0, 0, CANVAS, middle), "lower": (0, middle, CANVAS, CANVAS), "all": (0, 0, CANVAS, CANVAS)}
    boxes |= {"left": (0, 0, middle, CANVAS), "right": (middle, 0, CANVAS, CANVAS)}
    mask = Image.new("L", (CANVAS, CANVAS))
    mask.paste(255, boxes[half])
    return mask


def as_values(fields: Mapping[str, InputField], names: Sequence[str], settings: Mapping[str, object]) -> list[object]:
    """The values of components that show these settings; the default for those without."""
    return [settings.get(name, fields[name].info.default) for name in names]
