"""report.html: one page about a training with its curves, sample images, skipped files and settings."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from PIL import Image

from clip_gen.data.decoding import UnusableError
from clip_gen.files import write_text_atomic
from clip_gen.training.callbacks import read_history

STAGES = {"vqgan": "Stage 1: the VQGAN", "gpt": "Stage 2: the transformer"}
CURVES = {
    "vqgan": (
        ("loss",),  # rises when the discriminator starts
        ("fooled", "told_apart"),  # the generator's adversarial loss, and the discriminator's loss
        ("l1",),
        ("perceptual",),
        ("val_psnr",),
        ("codes_in_batch",),
        ("perplexity",),
    ),
    "gpt": (("loss", "val_loss"), ("embedding",), ("contrast",)),
}
COLOURS = ("#2563eb", "#dc2626")  # of the curves in one chart: training, validation
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 200, 60, 24
MOST_GRIDS = 10
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 960px; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { font-weight: 600 } table { border-collapse: collapse } td { padding: 2px 14px 2px 0; vertical-align: top }
figure { display: inline-block; margin: 0 16px 16px 0 } figcaption { color: #666; font-size: 13px }
img { max-width: 100%; image-rendering: pixelated } svg text { font-size: 11px; fill: #666 }
"""


def write_report(path: Path, work: Path, record: dict[str, object]) -> None:
    """Writes the page of a training. work: the folder of its stages' folders. record: as in training.json."""
    pictures = record["pictures"]
    body = [
        f"<h1>A training on {pictures['used']} pictures</h1>",
        f"<p>{pictures['held_back']} of them were held back to watch the losses on. {record['minutes']} minutes.</p>",
    ]
    body += [f"<p><strong>{html.escape(sentence)}</strong></p>" for sentence in record.get("warnings", [])]
    for name, title in STAGES.items():
        if name in record["stages"]:
            body += [f"<h2>{title}</h2>", _table(_plain(record["stages"][name])), *_curves(work / name, name)]
            body += _grids(work / name / "grids")
    if pictures["notes"]:
        body += ["<h2>Pictures changed for training</h2>", _table(pictures["notes"].items())]
    skipped = [(one["name"], str(UnusableError(one["reason"], one["detail"]))) for one in pictures["skipped"]]
    if skipped:
        body += [f"<h2>Skipped files: {len(skipped)}</h2>", _table(skipped)]
    body += ["<h2>Settings</h2>", _table(record["settings"].items()), "<h2>Plan</h2>", _nested(record["plan"])]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Training</title><style>{STYLE}</style>"
    write_text_atomic(path, page + "\n".join(body) + "</html>\n")


def _plain(values: dict[str, object]) -> list[tuple[str, object]]:
    return [(name, value) for name, value in values.items() if isinstance(value, int | float | str)]


def _table(rows: object) -> str:
    cells = "".join(f"<tr><td>{html.escape(str(a))}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


def _nested(values: dict[str, object]) -> str:
    parts = [_table((name, value) for name, value in values.items() if not isinstance(value, dict))]
    for name, value in values.items():
        if isinstance(value, dict):
            parts += [f"<h3>{html.escape(name)}</h3>", _nested(value)]
    return "".join(parts)


def _curves(folder: Path, name: str) -> list[str]:
    history = read_history(folder / "history.jsonl")
    figures = []
    for group in CURVES[name]:
        lines = {key: [(entry["step"], entry[key]) for entry in history if key in entry] for key in group}
        lines = {key: points for key, points in lines.items() if len(points) > 1}
        if lines:
            colours = dict(zip(lines, COLOURS, strict=False))  # a chart may have fewer lines than colours
            words = ", ".join(f'<span style="color:{colours[key]}">{key}</span>' for key in lines)
            figures.append(f"<figure>{_chart(lines, colours)}<figcaption>{words}</figcaption></figure>")
    return figures


def _chart(lines: dict[str, list[tuple[int, float]]], colours: dict[str, str]) -> str:
    """The values over the steps, as SVG."""
    every = [point for points in lines.values() for point in points]
    last, low, high = max(x for x, _ in every), min(y for _, y in every), max(y for _, y in every)
    span = high - low or 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT) * x / last
        return f"{across:.1f},{(HEIGHT - BOTTOM) * (1 - (y - low) / span) + 6:.1f}"

    drawn = "".join(
        f'<polyline fill=none stroke="{colours[key]}" stroke-width=1.5 points="{" ".join(place(*p) for p in points)}"/>'
        for key, points in lines.items()
    )
    words = (
        f"<text x=0 y=14>{high:.4g}</text><text x=0 y={HEIGHT - BOTTOM + 6}>{low:.4g}</text>"
        f"<text x={LEFT} y={HEIGHT - 2}>0</text><text x={WIDTH} y={HEIGHT - 2} text-anchor=end>step {last}</text>"
    )
    return f"<svg width={WIDTH} height={HEIGHT} role=img>{drawn}{words}</svg>"


def _grids(folder: Path) -> list[str]:
    """The last grids; consecutive grids with the same legend share one above them."""
    figures, before = [], ""
    for path in sorted(folder.glob("*.png"))[-MOST_GRIDS:]:
        with Image.open(path) as grid:
            legend = grid.text.get("legend", "")
        if legend != before:
            figures.append(f"<p>{html.escape(legend)}</p>")
            before = legend
        data = base64.b64encode(path.read_bytes()).decode()
        step = int(path.stem)
        figures.append(f'<figure><img src="data:image/png;base64,{data}"><figcaption>step {step}</figcaption></figure>')
    return figures
