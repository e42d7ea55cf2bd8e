"""The page: its components, and what happens when they are used."""

from __future__ import annotations

import asyncio
import functools
import html
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
from PIL import Image

from clip_gen.generate import checked_settings
from clip_gen.picture_files import drawing_settings
from clip_gen.pipeline import Progress, Stopped
from clip_gen.sampling.condition import open_picture
from clip_gen.ui.controls import (
    ADVANCED,
    BRUSH,
    CANVAS,
    FIRST,
    as_settings,
    as_values,
    canvas,
    component,
    half_mask,
    picture_input,
    read_fields,
)
from clip_gen.ui.history import SETTINGS, Drawing, History, keep_input_pictures
from clip_gen.ui.models import Models, examples, model_choices

log = logging.getLogger(__name__)

INTERVAL = 0.25  # seconds between two updates while drawing
MAX_DRAWINGS = 4  # at the same time, in several tabs
HALVES = ("upper", "lower", "left", "right", "all")
MAX_SHOWN = 60  # earlier drawings
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


class Latest:
    """The last report of a drawing, and its last preview."""

    progress: Progress | None = None
    preview: Image.Image | None = None

    def report(self, progress: Progress) -> None:
        self.progress, self.preview = progress, progress.preview or self.preview


class Page:
    """The components of the page, and the functions that its events call."""

    def __init__(self, models: Models, history: History, model: str):
        self.models, self.history, self.start = models, history, model
        self.fields = read_fields()
        self.threads = ThreadPoolExecutor(MAX_DRAWINGS, "drawing")
        self.stops: dict[str, threading.Event] = {}  # of the drawing that runs in each tab
        with gr.Blocks(title="CLIP-GEN", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            self.chosen, self.number = gr.State(None), gr.State(0)  # name of the drawing that is shown; picture in it
            self.listed = gr.State([])  # names of the earlier drawings
            gr.HTML("<h1>CLIP-GEN</h1>", padding=False)
            with gr.Row(elem_id="layout"):
                with gr.Column(elem_id="ask"):
                    self._build_question()
                with gr.Column(elem_id="results"):
                    self._build_results()
                with gr.Column(elem_id="settings"):
                    self._build_settings()
            self._connect()

    def _build_question(self) -> None:
        self.model = gr.Dropdown(
            label="Model", allow_custom_value=True, elem_id="model", info="or type a folder, a weights tar or its URL"
        )
        self.prompt = component(self.fields["prompt"])
        with gr.Row():
            self.draw_button = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
            self.cancel_button = gr.Button("Cancel", variant="stop", elem_id="cancel", interactive=False, min_width=90)
        self.status = gr.HTML(said(""), elem_id="status", padding=False)
        self.examples = gr.Dataset(
            label="Examples", components=[gr.Textbox(visible=False)], samples=[], elem_id="examples"
        )
        with gr.Accordion("What this model knows", open=False, elem_id="known"):
            self.known = gr.Markdown()

    def _build_results(self) -> None:
        gr.HTML("<h2>Pictures, best first</h2>", padding=False)
        self.preview = gr.Image(
            label="So far", visible=False, interactive=False, buttons=[], elem_id="preview", height=260
        )
        gallery = {"show_label": False, "object_fit": "contain", "interactive": False, "height": "auto"}
        buttons = ["download", "fullscreen"]
        self.gallery = gr.Gallery(columns=4, fit_columns=False, buttons=buttons, elem_id="pictures", **gallery)
        with gr.Column(visible=False, variant="panel", elem_id="picture") as self.panel:
            self.details = gr.HTML(padding=False)
            with gr.Row():
                self.vary = gr.Button("Variations of it", size="sm", elem_id="vary", min_width=130)
                self.paint = gr.Button("Redraw a part of it", size="sm", elem_id="paint", min_width=130)
                self.save = gr.DownloadButton("Download picture", size="sm", elem_id="save", min_width=130)
                self.save_settings = gr.DownloadButton(
                    "Download settings", size="sm", elem_id="save-settings", min_width=130
                )
                self.save_sheet = gr.DownloadButton("Contact sheet", size="sm", visible=False, min_width=100)
            with gr.Accordion("The command that draws it again", open=False):
                self.command = gr.Textbox(
                    show_label=False, lines=2, interactive=False, buttons=["copy"], elem_id="command", container=False
                )
        with gr.Accordion("Earlier drawings", elem_id="history"):
            self.past = gr.Gallery(
                columns=6, fit_columns=False, allow_preview=False, buttons=[], elem_id="past", **gallery
            )
            self.remove = gr.Button("Remove the drawing shown above", size="sm", elem_id="remove", interactive=False)

    def _build_settings(self) -> None:
        with gr.Accordion("Draw from a picture", open=False, elem_id="from-picture") as self.from_picture:
            self.image = picture_input("image")
            image_weight = component(self.fields["image_weight"])
        controls = {"prompt": self.prompt, "image": self.image, "image_weight": image_weight}
        controls |= self._build_mask()
        controls |= {name: component(self.fields[name]) for name in ("negative_prompt", *FIRST)}
        with gr.Accordion("Advanced settings", open=False, elem_id="advanced"):
            for title, names in ADVANCED.items():
                gr.Markdown(f"### {title}")
                controls |= {name: component(self.fields[name]) for name in names}
        self.controls = controls

    def _build_mask(self) -> dict[str, gr.components.Component]:
        with gr.Accordion("Redraw a part of a picture", open=False, elem_id="redraw") as self.redraw:
            gr.Markdown("The prompt says what the *whole* picture shows. Paint over what to redraw, or choose a part.")
            picture = picture_input("init_image")
            brush = gr.Brush(default_size=30, colors=[BRUSH], color_mode="fixed")
            options = {"sources": (), "transforms": (), "layers": False, "brush": brush, "buttons": []}
            self.editor = gr.ImageEditor(
                type="pil", label="Mask", canvas_size=(CANVAS, CANVAS), visible=False, elem_id="mask", **options
            )
            with gr.Row(visible=False) as self.halves:
                for half in HALVES:
                    button = gr.Button(half.capitalize(), size="sm", min_width=60, elem_id=f"mask-{half}")
                    button.click(functools.partial(self.paint_half, half), picture, self.editor)
        changed = [picture.upload, picture.input, picture.clear]  # by the user
        gr.on(changed, self.show_canvas, picture, [self.editor, self.halves])
        return {"init_image": picture, "mask": self.editor}

    def _connect(self) -> None:
        """Says which function an event calls."""
        inputs = [self.model, *self.controls.values()]
        shown = [self.gallery, self.chosen, self.number, self.panel, self.details, self.save, self.save_settings]
        shown += [self.save_sheet, self.command, self.remove]
        buttons = [self.status, self.preview, self.draw_button, self.cancel_button]
        drawn = [*buttons, *shown, self.past, self.listed]
        drawing = {"show_progress": "hidden", "concurrency_limit": MAX_DRAWINGS}
        gr.on([self.draw_button.click, self.prompt.submit], self.draw, inputs, drawn, **drawing)
        self.cancel_button.click(self.cancel, None, self.status, queue=False)
        self.gallery.select(self.choose, self.chosen, shown[1:], show_progress="hidden")
        varied = [self.image, self.prompt, self.controls["seed"], self.from_picture]
        self.vary.click(self.use_as_image, [self.chosen, self.number], varied).then(self.draw, inputs, drawn, **drawing)
        painted = [self.controls["init_image"], self.redraw, self.editor, self.halves]
        self.paint.click(self.use_as_init_image, [self.chosen, self.number], painted)
        self.past.select(
            self.show_past,
            self.listed,
            [*shown, self.status, self.model, self.redraw, self.halves, *self.controls.values()],
        )
        self.remove.click(self.remove_shown, self.chosen, [*shown, self.past, self.listed, self.status])
        self.examples.click(lambda sample: sample[0], self.examples, self.prompt)
        about_model = [self.examples, self.known, self.status]
        self.model.change(self.describe_model, self.model, about_model)
        self.blocks.load(self.open, None, [self.model, self.past, self.listed, *shown])

    def open(self) -> dict[gr.components.Component, object]:
        """The page after it was loaded: the models, the earlier drawings, and the last of them."""
        last = next(iter(self.history.drawings()), None)
        choices = model_choices()
        return {self.model: gr.Dropdown(choices=choices, value=self.start), **self._history(), **self._shown(last)}

    def describe_model(self, name: str) -> dict[gr.components.Component, object]:
        """Examples of what a model knows. Loads it, if it is not loaded."""
        try:
            model = self.models.get(name)
        except (ValueError, OSError) as error:
            return {self.status: said(str(error), problem=True), self.examples: gr.Dataset(samples=[]), self.known: ""}
        known = f"{model.words.summary}." if model.words.summary else "It has no vocabulary.txt that says it."
        samples = [[prompt] for prompt in examples(model)]
        return {self.examples: gr.Dataset(samples=samples), self.known: known, self.status: said("")}

    async def draw(
        self, request: gr.Request, model: str, *values: object
    ) -> AsyncIterator[dict[gr.components.Component, object]]:
        """Draws, and meanwhile shows the progress. A reload of the page ends it, like a click on Cancel."""
        self.cancel(request)  # what this tab draws already
        stop = self.stops[request.session_hash] = threading.Event()
        started = time.monotonic()
        latest, shown = Latest(), None
        job = self.threads.submit(self._draw, model, values, stop, latest)
        busy = {self.draw_button: gr.Button(interactive=False), self.cancel_button: gr.Button(interactive=True)}
        try:
            while not job.done():
                update = {self.status: working(latest.progress), **busy}
                if latest.preview is not shown:
                    shown = latest.preview
                    update[self.preview] = gr.Image(shown, visible=True)
                yield update
                await asyncio.sleep(INTERVAL)
            drawing = job.result()
            text = f"Drawn in {time.monotonic() - started:.1f} s with seed {drawing.settings['seed']}"
            end = {self.status: said(text, drawing.settings["warnings"]), **self._history(), **self._shown(drawing)}
        except Stopped:
            end = {self.status: said("Cancelled")}
        except (ValueError, OSError) as error:
            end = {self.status: said(str(error), problem=True)}
        finally:
            stop.set()
            if self.stops.get(request.session_hash) is stop:
                del self.stops[request.session_hash]
        yield end | {
            self.draw_button: gr.Button(interactive=True),
            self.cancel_button: gr.Button(interactive=False),
            self.preview: gr.Image(visible=False),
        }

    def _draw(self, name: str, values: Sequence[object], stop: threading.Event, latest: Latest) -> Drawing:
        with self.history.new_folder() as folder:
            settings = checked_settings(as_settings(self.fields, list(self.controls), values, folder))
            model = self.models.get(name)
            settings = keep_input_pictures(settings, folder, model.config.vqgan.resolution)
            watched = {"should_stop": stop.is_set, "on_progress": latest.report, "previews": True}
            result = model.generate(**drawing_settings(settings), **watched)
            return self.history.add(folder, model, name, result, settings, stop.is_set)

    def cancel(self, request: gr.Request) -> str:
        if stop := self.stops.get(request.session_hash):
            stop.set()
        return said("Cancelling")

    def close(self) -> None:
        """Ends all drawings."""
        for stop in list(self.stops.values()):
            stop.set()

    def choose(self, name: str, event: gr.SelectData) -> dict[gr.components.Component, object]:
        """The picture that was clicked."""
        shown = self._shown(self.history.find(name), event.index)
        shown.pop(self.gallery)
        return shown

    def use_as_image(self, name: str, number: int) -> tuple[object, ...]:
        """The picture as the image prompt, alone and with a new seed."""
        drawing = self.history.find(name)
        picture = str(drawing.pictures[number]) if drawing else None
        return picture, "", None, gr.Accordion(open=True)

    def use_as_init_image(self, name: str, number: int) -> tuple[object, ...]:
        """The picture as the one to redraw."""
        drawing = self.history.find(name)
        picture = str(drawing.pictures[number]) if drawing else None
        return picture, gr.Accordion(open=True), *self.show_canvas(picture)

    def show_canvas(self, picture: str | None) -> tuple[object, ...]:
        """The canvas for the mask with the picture to redraw."""
        if picture is None:
            return gr.ImageEditor(value=None, visible=False), gr.Row(visible=False)
        return gr.ImageEditor(canvas(open_picture(picture)), visible=True), gr.Row(visible=True)

    def paint_half(self, half: str, picture: str | None) -> dict[str, object] | None:
        return canvas(open_picture(picture), half_mask(half)) if picture else None

    def show_past(self, names: list[str], event: gr.SelectData) -> dict[gr.components.Component, object]:
        """An earlier drawing with its settings and input pictures."""
        drawing = self.history.find(names[event.index])
        if drawing is None:
            return {self.status: said("This drawing was removed from the history", problem=True)}
        values = as_values(self.fields, list(self.controls), drawing.settings)
        settings = dict(zip(self.controls.values(), values, strict=True))
        for name in ("image", "init_image"):
            path = drawing.input_picture(name)
            settings[self.controls[name]] = path and str(path)
        settings |= self._painted(drawing)
        model = {self.model: drawing.settings["weights"]}
        return {**settings, **model, **self._shown(drawing), self.status: said("An earlier drawing")}

    def _painted(self, drawing: Drawing) -> dict[gr.components.Component, object]:
        """The canvas with the mask of a drawing."""
        picture, mask = drawing.input_picture("init_image"), drawing.input_picture("mask")
        value = canvas(open_picture(picture), open_picture(mask)) if picture and mask else None
        has_mask = value is not None
        shown = {self.halves: gr.Row(visible=has_mask), self.redraw: gr.Accordion(open=has_mask)}
        return {self.editor: gr.ImageEditor(value, visible=has_mask), **shown}

    def remove_shown(self, name: str) -> dict[gr.components.Component, object]:
        if drawing := self.history.find(name):
            self.history.remove(drawing.name)
        return {**self._shown(None), **self._history(), self.status: said("Removed")}

    def _history(self) -> dict[gr.components.Component, object]:
        drawings = self.history.drawings()[:MAX_SHOWN]
        pictures = [(str(drawing.pictures[0]), drawing.title) for drawing in drawings]
        return {self.past: pictures, self.listed: [drawing.name for drawing in drawings]}

    def _shown(self, drawing: Drawing | None, number: int = 0) -> dict[gr.components.Component, object]:
        """The pictures of a drawing, and what can be done with one of them."""
        if drawing is None:
            return {self.gallery: None, self.chosen: None, self.panel: gr.Column(visible=False), self.remove: off()}
        pictures, captions = list(map(str, drawing.pictures)), drawing.captions()
        title = f"Picture {number + 1} of {len(pictures)}: {captions[number]}"
        return {
            self.gallery: gr.Gallery(list(zip(pictures, captions, strict=True)), selected_index=None),
            self.chosen: drawing.name,
            self.number: number,
            self.panel: gr.Column(visible=True),
            self.details: f"<p><b>{title}</b><br>{html.escape(drawing.title)}</p>",
            self.save: gr.DownloadButton(value=pictures[number]),
            self.save_settings: gr.DownloadButton(value=str(drawing.folder / SETTINGS)),
            self.save_sheet: gr.DownloadButton(value=drawing.sheet and str(drawing.sheet), visible=bool(drawing.sheet)),
            self.command: drawing.settings["command"],
            self.remove: gr.Button(interactive=True),
        }


def working(progress: Progress | None) -> str:
    """A bar, not for screen readers to read at every step."""
    if progress is None or not progress.tokens:
        return "<div><progress aria-label='drawing'></progress><p>Drawing</p></div>"
    share = progress.tokens / progress.total_tokens
    left = progress.seconds * (1 / share - 1)
    speed = progress.tokens / max(progress.seconds, 1e-3)
    bar = f"<progress aria-label='drawing' value='{share:.3f}'></progress>"
    return f"<div>{bar}<p>Drawing: {share:.0%}, {speed:,.0f} tokens per second, {left:.0f} s left</p></div>"


def off() -> gr.Button:
    return gr.Button(interactive=False)


def said(text: str, warnings: Sequence[str] = (), problem: bool = False) -> str:
    """A sentence that a screen reader reads when it changes."""
    lines = [f'<p class="{"problem" if problem else "said"}">{html.escape(text)}</p>']
    lines += [f'<p class="warning">{html.escape(warning)}</p>' for warning in warnings]
    return f'<div role="status" aria-live="polite">{"".join(lines)}</div>'
