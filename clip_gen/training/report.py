"""What a training did: its record, training.json, and report.html with curves, sample images and skipped files."""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from clip_gen.data.archive import Pictures
from clip_gen.data.decoding import UnusableError
from clip_gen.files import write_text_atomic
from clip_gen.training.callbacks import read_history
from clip_gen.training.encoding import few_pictures
from clip_gen.training.plan import Plan, TrainSettings
from clip_gen.training.progress import shortage
from clip_gen.weights.model_folder import ModelFolderError, load_record

log = logging.getLogger(__name__)

Stages = dict[str, dict[str, object]]  # the record of each stage

TITLES = {"vqgan": "Stage 1: the VQGAN", "gpt": "Stage 2: the transformer"}
DISTANCES = ("fid_inception", "fid_clip", "cmmd")  # of evaluations.py
CHARTS = {  # the values in each; fooled is the generator's adversarial loss, told_apart the discriminator's loss
    "vqgan": ("loss", "fooled told_apart", "l1", "perceptual", "val_psnr", "codes_in_batch", "perplexity", *DISTANCES),
    "gpt": ("loss val_loss", "embedding", "contrast", *DISTANCES),
}
COLOURS = ("#2563eb", "#dc2626")  # of the values in one chart
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 200, 60, 24
MAX_GRIDS = 10
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 960px; margin: 2em auto; padding: 0 1em }
h1, h2 { font-weight: 600 } table { border-collapse: collapse } td { padding: 2px 14px 2px 0; vertical-align: top }
figure { display: inline-block; margin: 0 16px 16px 0 } figcaption { color: #666; font-size: 13px }
img { max-width: 100%; image-rendering: pixelated } svg text { font-size: 11px; fill: #666 }
"""


def training_record(
    settings: TrainSettings, plan: Plan, pictures: Pictures, held_back: int, stages: Stages, minutes: float
) -> dict[str, object]:
    """minutes: of all starts."""
    values = asdict(settings)
    # The record is public: no path of this machine, no secret of a URL.
    values["base"] = Path(urlsplit(settings.base).path).name
    # The last stage's limit counts: the export may have been interrupted and started again with another.
    values["max_minutes"] = list(stages.values())[-1].get("max_minutes", settings.max_minutes)
    return {
        "pictures": pictures.as_json() | {"held_back": held_back},
        "settings": values,
        "plan": asdict(plan),
        "stages": stages,
        "warnings": shortages(settings, len(pictures.paths) - held_back, stages),
        "minutes": round(minutes, 1),
        "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
    }


def earlier_record(model: Path, stages: Stages) -> dict[str, object]:
    """The parts of the model folder's training.json that a start without training must not change; empty if the folder
    is missing or has other stages.
    """
    try:
        record = load_record(model)
    except ModelFolderError:
        return {}
    kept = ("settings", "plan", "minutes", "versions") if record.get("stages") == stages else ()
    return {name: record[name] for name in kept if name in record}


def shortages(settings: TrainSettings, pictures: int, stages: Stages) -> list[str]:
    """A sentence for each thing that the stages had too little time for."""
    sentences = []
    for name, values in stages.items():
        minutes = values.get("max_minutes", settings.max_minutes)
        steps, planned = values["steps"], values.get("planned_steps", 0)  # 0: by an earlier version
        advice = shortage(name, steps, planned, minutes, values.get("fine_tunes", False))
        if minutes and values.get("ended_by") == "time" and advice:
            # More minutes train only the last stage further.
            where = "" if name == list(stages)[-1] else ", in another folder"
            sentences.append(f"{name}: its time ended after {steps:,} of {planned:,} steps, {advice}{where}")
        encoded = values.get("pictures", pictures)
        if encoded < pictures:
            sentences.append(f"{few_pictures(encoded, pictures)}, in another folder")
    return sentences


def log_finished(out: Path, stages: Stages) -> None:
    """Says that the training was finished before this start, and how to train further."""
    last = list(stages.values())[-1]
    steps = ", ".join(f"{name}: {values['steps']} steps" for name, values in stages.items())
    more = f"give more than {last['max_minutes']:g} max_minutes, or " if last.get("ended_by") == "time" else ""
    log.info(
        f"{out} holds a finished training ({steps}), so nothing is trained. To train further, {more}start a training "
        f"in another folder with base={out / 'weights.tar'}"
    )


def write_report(path: Path, work: Path, record: dict[str, object]) -> None:
    """Writes the page of a training. work: the folder of its stages' folders. record: as in training.json."""
    pictures = record["pictures"]
    body = [
        f"<h1>A training on {pictures['used']} pictures</h1>",
        f"<p>{pictures['held_back']} of them were held back to watch the losses on. {record['minutes']} minutes.</p>",
    ]
    body += [f"<p><strong>{html.escape(sentence)}</strong></p>" for sentence in record.get("warnings", [])]
    for name, stage in record["stages"].items():
        history = read_history(work / name / "history.jsonl")
        values = [(key, value) for key, value in stage.items() if isinstance(value, int | float | str)]
        body += [f"<h2>{TITLES[name]}</h2>", _table(values), *(_chart(history, names) for names in CHARTS[name])]
        body += _grids(work / name / "grids")
    if pictures["notes"]:
        body += ["<h2>Pictures changed for training</h2>", _table(pictures["notes"].items())]
    skipped = [(one["name"], str(UnusableError(one["reason"], one["detail"]))) for one in pictures["skipped"]]
    if skipped:
        body += [f"<h2>Skipped files: {len(skipped)}</h2>", _table(skipped)]
    plan = html.escape(json.dumps(record["plan"], indent=2))
    body += ["<h2>Settings</h2>", _table(record["settings"].items()), f"<h2>Plan</h2><pre>{plan}</pre>"]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Training</title><style>{STYLE}</style>"
    write_text_atomic(path, page + "\n".join(body) + "</html>\n")


def _table(rows: Iterable[tuple[str, object]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(str(a))}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


def _chart(history: list[dict], names: str) -> str:
    """The values of these names over the steps, as SVG; empty if there are none."""
    lines = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names.split()}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return ""
    steps, values = zip(*(point for points in lines.values() for point in points), strict=True)
    last, low, high = max(steps), min(values), max(values)
    across, down = (WIDTH - LEFT) / last, (HEIGHT - BOTTOM) / (high - low or 1.0)
    drawn, captions = [], []
    # Not strict: a chart has one line or two, and there are two colours.
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        places = " ".join(f"{LEFT + across * step:.1f},{6 + down * (high - value):.1f}" for step, value in points)
        drawn.append(f'<polyline fill=none stroke="{colour}" stroke-width=1.5 points="{places}"/>')
        captions.append(f'<span style="color:{colour}">{name}</span>')
    axes = (
        f"<text x=0 y=14>{high:.4g}</text><text x=0 y={HEIGHT - BOTTOM + 6}>{low:.4g}</text>"
        f"<text x={LEFT} y={HEIGHT - 2}>0</text><text x={WIDTH} y={HEIGHT - 2} text-anchor=end>step {last}</text>"
    )
    chart = f"<svg width={WIDTH} height={HEIGHT} role=img>{''.join(drawn)}{axes}</svg>"
    return f"<figure>{chart}<figcaption>{', '.join(captions)}</figcaption></figure>"


def _grids(folder: Path) -> list[str]:
    """The last grids; consecutive grids with the same legend share one above them."""
    figures, before = [], ""
    for path in sorted(folder.glob("*.png"))[-MAX_GRIDS:]:
        with Image.open(path) as grid:
            legend = grid.text.get("legend", "")
        if legend != before:
            figures.append(f"<p>{html.escape(legend)}</p>")
            before = legend
        data = base64.b64encode(path.read_bytes()).decode()
        step = int(path.stem)
        figures.append(f'<figure><img src="data:image/png;base64,{data}"><figcaption>step {step}</figcaption></figure>')
    return figures
