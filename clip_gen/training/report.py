"""What a training did: its record, training.json, and its page, report.html."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from clip_gen.data.archive import Pictures
from clip_gen.data.decoding import UnusableError
from clip_gen.files import write_text_atomic
from clip_gen.prompts import split_prompts
from clip_gen.training import copies
from clip_gen.training.callbacks import read_history
from clip_gen.training.curves import charts
from clip_gen.training.encoding import few_pictures
from clip_gen.training.grids import read_grid
from clip_gen.training.plan import Plan, TrainSettings
from clip_gen.training.progress import shortage
from clip_gen.training.verdict import resolved_settings, verdict
from clip_gen.weights.model_folder import ModelFolderError, load_record

log = logging.getLogger(__name__)

Stages = dict[str, dict[str, object]]  # the record of each stage

TITLES = {"vqgan": "Stage 1: the VQGAN", "gpt": "Stage 2: the transformer"}
RUNNING = "Running"  # how the sentence of a training begins that has not been interrupted
RENEWED_EVERY = 30  # seconds, in the browser
SHOWN_GRIDS, SHOWN_PICTURES, SHOWN_PER_PROMPT = 5, 6, 2
MAX_SKIPPED = 1000  # files in the table
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1, h2 { font-weight: 600; margin-bottom: 0.4em } h2 { margin-top: 2em; border-top: 1px solid #ddd; padding-top: 1em }
table { border-collapse: collapse } td, th { padding: 2px 14px 2px 0; vertical-align: top; text-align: left }
th { font-weight: 600 }
.grids { margin-bottom: 1.5em } .grids td, .grids th { padding: 2px 8px 2px 0; vertical-align: middle }
.grids td { white-space: nowrap } .grids th { vertical-align: bottom } .grids .text { white-space: normal }
.grids .text, .grids th { max-width: 9em }
.grids img { width: 96px; outline: 1px solid #ddd; margin: 1px 3px 1px 1px }
.verdict, .warning { max-width: 62em }
.verdict { background: #f3f6fb; border-left: 4px solid #2563eb; padding: 0.6em 1.2em } .verdict pre { margin: 0.4em 0 }
.warning { background: #fff4e5; border-left: 4px solid #d97706; padding: 0.4em 1.2em; margin: 0.6em 0 }
.running { font-weight: 600 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 8px 24px }
figure { margin: 0 } figure img { width: 100% } figcaption { color: #555; font-size: 13px; line-height: 1.35 }
pre { overflow-x: auto } summary { cursor: pointer }
"""


def training_record(
    settings: TrainSettings,
    plan: Plan,
    pictures: Pictures,
    held_back: int,
    stages: Stages,
    minutes: float,
    base: Mapping[str, object],
) -> dict[str, object]:
    """minutes: of all starts. base: its name, what its CLIP knows if the model says so, and the Choice of base auto."""
    values = asdict(settings)
    # The record is public: no path of this machine, no secret of a URL.
    values["base"] = Path(urlsplit(settings.base).path).name
    # The last stage's limit counts: the export may have been interrupted and started again with another.
    values["max_minutes"] = next(reversed(stages.values()), {}).get("max_minutes", settings.max_minutes)
    return {
        "base": {**base, "name": base["name"] if settings.chooses_base else values["base"]},
        "pictures": pictures.as_json() | {"held_back": held_back},
        "settings": values,
        "plan": asdict(plan),
        "stages": stages,
        "warnings": [
            *([base["warning"]] if base.get("warning") else []),
            *shortages(settings, len(pictures.paths) - held_back, stages),
            *filter(None, [copies.warning(stages.get("gpt", {}))]),
        ],
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


def write_report(path: Path, work: Path, record: Mapping[str, object], running: str = "") -> None:
    """Writes the page of a training. work: the folder of its stages' folders. record: as in training.json.

    running: a sentence that says how far an unfinished training is; browsers then renew the page by themselves.
    """
    body = _top(record, running)
    for name, stage in record["stages"].items():
        history = read_history(work / name / "history.jsonl")
        body += [f"<h2>{TITLES[name]}</h2>", *_grids(sorted((work / name / "grids").glob("*.png")))]
        body += [f"<div class=curves>{''.join(charts(name, history))}</div>"]
        values = [(key, value) for key, value in stage.items() if isinstance(value, int | float | str)]
        body += [f"<details><summary>The record of this stage</summary>{_table(values)}</details>"]
    body += _pictures(record["pictures"])
    plan = html.escape(json.dumps(record["plan"], indent=2))
    body += ["<h2>Settings</h2>", _table(resolved_settings(record), ("setting", "chosen", "used", "meaning"))]
    body += [f"<details><summary>The plan, in full</summary><pre>{plan}</pre></details>"]
    renewed = f"<meta http-equiv=refresh content={RENEWED_EVERY}>" if running.startswith(RUNNING) else ""
    page = f"<!doctype html><html lang=en><meta charset=utf-8>{renewed}<title>Training</title><style>{STYLE}</style>"
    write_text_atomic(path, page + "\n".join(body) + "</html>\n")


def _top(record: Mapping[str, object], running: str) -> list[str]:
    """The verdict, warnings, and how to use the weights."""
    pictures, minutes = record["pictures"], record["minutes"]
    written = f" Written at {time.strftime('%H:%M:%S')}." if running.startswith(RUNNING) else ""
    state = html.escape(running + written) or f"Finished after {minutes:,} minutes."
    body = [f"<h1>A training on {pictures['used']:,} pictures</h1>", f"<p class=running>{state}</p>"]
    paragraph = html.escape(verdict(record, bool(running)))
    prompts = split_prompts(str(record["settings"].get("sample_prompts", "")))
    use = f"script/predict -e COG_WEIGHTS=weights.tar -i prompt={shlex.quote(prompts[0] if prompts else '...')}"
    shown = "" if running else f"<p>To draw, with the path of weights.tar:</p><pre>{html.escape(use)}</pre>"
    body += [f"<div class=verdict><p>{paragraph}</p>{shown}</div>"]
    return body + [f"<p class=warning>Warning: {html.escape(words)}</p>" for words in record.get("warnings", [])]


def _pictures(pictures: Mapping[str, object]) -> list[str]:
    """What was changed in the pictures, and which files were skipped."""
    body = []
    if pictures["notes"]:
        body += ["<h2>Pictures changed for training</h2>", _table(pictures["notes"].items())]
    count, first = len(pictures["skipped"]), pictures["skipped"][:MAX_SKIPPED]
    if count:
        rows = [(one["name"], str(UnusableError(one["reason"], one["detail"]))) for one in first]
        body += [f"<h2>Skipped files: {count:,}</h2>", _table(rows)]
    if count > MAX_SKIPPED:
        body += [f"<p>training.json names all; here are the first {MAX_SKIPPED:,}.</p>"]
    return body


def _table(rows: Iterable[Sequence[object]], heads: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{html.escape(words)}</th>" for words in heads)
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _grids(paths: Sequence[Path]) -> list[str]:
    """Some of the grids side by side, spread evenly over the steps: a row for each picture and prompt."""
    grids = {int(path.stem): read_grid(path) for path in evenly_spread(paths, SHOWN_GRIDS)}
    grids = {step: rows for step, rows in grids.items() if rows}  # earlier versions wrote no labels
    if not grids:
        return []
    (source, pictures), (result, _), *prompts = list(grids.values())[-1]
    heads = [source, *("before training" if step == 0 else f"step {step:,}" for step in grids)]
    lines = [
        [_images([picture]), *(_images(rows[1][1][i : i + 1]) for rows in grids.values())]
        for i, picture in enumerate(pictures[:SHOWN_PICTURES])
    ]
    for prompt, _ in prompts:
        drawn = [dict(rows[2:]).get(prompt, [])[:SHOWN_PER_PROMPT] for rows in grids.values()]
        lines.append([f"<div class=text>{html.escape(f'“{prompt}”')}</div>", *map(_images, drawn)])
    head = "".join(f"<th>{html.escape(words)}</th>" for words in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    prompted = ", and below them what is drawn of the sample prompts" if prompts else ""
    words = html.escape(f"Left: {source}. Beside each: {result}, as the training goes on{prompted}.")
    return [f"<p>{words}</p><table class=grids><tr>{head}</tr>{body}</table>"]


def evenly_spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the paths: the first, the last, and those whose steps are nearest to an even spread."""
    steps = {int(path.stem): path for path in paths}
    first, last = min(steps, default=0), max(steps, default=0)
    targets = [first + (last - first) * i / (count - 1) for i in range(count)] if steps else []
    return [steps[step] for step in sorted({min(steps, key=lambda step: abs(step - target)) for target in targets})]


def _images(pictures: Iterable[Image.Image]) -> str:
    return "".join(f'<img src="data:image/png;base64,{_base64(picture)}" alt="">' for picture in pictures)


def _base64(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
