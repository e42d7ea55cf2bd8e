"""The reports of an evaluation on pictures: one HTML page with everything in it, JSON, and a table for model cards."""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import importlib.metadata
import io
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from clip_gen.data.decoding import load_picture
from clip_gen.evaluation.figures import (
    BLURS,
    CLOSE_TO_REAL,
    CLOSE_TO_TRAINING,
    FROM_PICTURES,
    FROM_PROMPTS,
    Figure,
    as_json,
    as_markdown,
    as_text,
    comparison_text,
    differences,
)
from clip_gen.evaluation.time_plot import time_plot
from clip_gen.files import write_text_atomic
from clip_gen.images import resized_square, to_pil, to_tensor
from clip_gen.sampling.sampler import Sampling

if TYPE_CHECKING:
    from clip_gen.evaluation.measuring import Drawn
    from clip_gen.evaluation.pictures import Evaluation

REPORT, TABLE, PAGE = "report.json", "report.md", "report.html"
SHOWN, HARDEST, PAIRS = 32, 12, 12  # pictures in the page
MAX_SIDE = 192  # of a picture in the page, in pixels
VERSIONS = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "numpy", "pillow")
EXPLAINED = {
    "FID": "distance between the feature statistics of both sets; small sets have a higher one, so only compare equal "
    "numbers of pictures",
    **{name: f"FID of pictures that are blurred with a radius of {name[-1]} pixels" for name in BLURS},
    "KID × 1000": "another distance between these features, but no higher for small sets; may be below 0",
    "CMMD": "distance between the CLIP embeddings of both sets; higher for small sets",
    "IS": "inception score: how certain InceptionV3 is of what a picture shows, and how many things all of them show; "
    "small sets have a lower one, and real pictures play no part",
    "precision": "share of drawn pictures that look like real ones",
    "recall": "share of real pictures that look like drawn ones",
    "density": "how many real neighbourhoods a drawn picture lies in; 1 for pictures of the same kind",
    "coverage": "share of real pictures with a drawn one in their neighbourhood",
    "CLIP score": "100 times the cosine with the prompt, or with the picture whose embedding was drawn from",
    "R-precision": "share of pictures whose own prompt is nearer than up to 99 random others",
    CLOSE_TO_TRAINING: "share of drawn pictures that are as close to a training picture as half of the training "
    "pictures are to each other; 50 % for new pictures, 100 % for copies",
    CLOSE_TO_REAL: "share of drawn pictures that are as close to a real picture as half of the real pictures are to "
    "each other, without the picture that a drawn one was drawn from; 50 % for new pictures, 100 % for copies",
    "PSNR": "peak signal-to-noise ratio of reconstructions, in dB; every 6 dB halve the error",
    "SSIM": "of reconstructions, 1 for equal pictures",
    "LPIPS": "perceptual distance of reconstructions, 0 for equal pictures",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: 14px; width: 100% }
td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #eee; vertical-align: top }
td.number { font-weight: 600 } td.number, td.short { white-space: nowrap }
.note { color: #a33 } .quiet { color: #666; font-size: 14px }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 12px }
.grid.pairs { grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)) }
figure { margin: 0 } figcaption { font-size: 12px; line-height: 1.3; color: #444; overflow-wrap: anywhere }
figure img { width: 100%; border-radius: 3px; outline: 1px solid #ddd }
figure .two { display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
.wide { overflow-x: auto } .better { color: #17692b } .worse { color: #a3261b }
"""


def write_reports(
    evaluation: Evaluation,
    arguments: argparse.Namespace,
    other: tuple[dict[str, object], list[Figure]] | None,
    baseline: Sequence[Mapping[str, object]],
) -> str:
    """Writes report.json, report.md and report.html. Returns the table for the terminal.

    other: the report to compare with, as read_report returns it. baseline: plots of `optimise`, as read_points returns
    them.
    """
    out, figures, about = arguments.out, evaluation.measuring.figures, describe(evaluation, arguments)
    found = differences(figures, other[1], _different(about, other[0])) if other else []
    title = f"{about['model']}, measured on {about['images']:,} pictures"
    lines = [f"Measured with `{about['command']}`, seed {about['settings']['seed']}, {about['date']}."]
    write_text_atomic(out / REPORT, as_json(figures, about))
    write_text_atomic(out / TABLE, as_markdown(title, figures, lines))
    body = [*_head(title, about), *_samples(evaluation), _table(figures)]
    if other:
        body += [*_comparison(other[0], found), *_side_by_side(evaluation, about, other[0], arguments.compare.parent)]
    body += ["<h2>Quality against time</h2>"] * bool(baseline) + [time_plot(plot) for plot in baseline]
    body += [*_hardest_prompts(evaluation), *_pairs(evaluation), *_foot(about)]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    write_text_atomic(out / PAGE, page + "\n".join(body) + "</html>\n")
    texts = [as_text(figures), comparison_text(about["model"], other[0].get("model", "other"), found) if other else ""]
    return "\n\n".join(filter(None, [*texts, f"wrote {out / REPORT}, {out / TABLE} and {out / PAGE}"]))


def describe(evaluation: Evaluation, arguments: argparse.Namespace) -> dict[str, object]:
    """What was measured, and with what."""
    model = evaluation.model
    numbers = {"candidates": arguments.candidates, "count": arguments.count, "features": arguments.features}
    files = {name: getattr(arguments, name) for name in ("images", "prompts", "training", "clip")}
    given = {name: Path(path).name for name, path in files.items() if path} | numbers
    given |= {"blur": " ".join(map(str, arguments.blur))} if arguments.blur else {}
    given |= {field.name: getattr(arguments, field.name) for field in fields(Sampling)}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    versions = {name: _version(name) for name in VERSIONS}
    return {
        "model": model.config.name,
        "model_sha256": model.sha256,
        "images": len(evaluation.images),
        **{f"{name}_sha256": value for name, value in evaluation.fingerprints.items()},
        "prompts": len(evaluation.prompts),
        "prompts_sha256": hashlib.sha256("\n".join(evaluation.prompts).encode()).hexdigest(),
        "from_image_embeddings": len(evaluation.sources),
        "command": f"python -m clip_gen evaluate MODEL {' '.join(words)}",
        "settings": evaluation.settings,
        "candidates": max(evaluation.candidates.values(), default=1),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.processor() or "cpu",
        "versions": {name: found for name, found in versions.items() if found},
        "closest": {
            source: [
                {
                    "picture": drawn.paths[i].name,
                    "neighbour": evaluation.training[drawn.neighbours[i]].name,
                    "distance": round(float(drawn.distances[i]), 3),
                }
                for i in _closest(drawn)
            ]
            for source, drawn in evaluation.drawn.items()
        },
        "hardest_prompts": [
            {"prompt": evaluation.prompts[i], "clip_score": round(float(evaluation.drawn[FROM_PROMPTS].scores[i]), 2)}
            for i in _hardest(evaluation)
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardest(evaluation: Evaluation) -> list[int]:
    """The numbers of the prompts with the lowest CLIP scores."""
    drawn = evaluation.drawn.get(FROM_PROMPTS)
    count = min(HARDEST, -(-len(evaluation.prompts) // 4))
    return drawn.scores.argsort()[:count].tolist() if drawn else []


def _closest(drawn: Drawn) -> list[int]:
    """The numbers of the pictures that are closest to a training picture: copies would be among them."""
    return drawn.distances.argsort(stable=True)[:PAIRS].tolist()


def _head(title: str, about: Mapping[str, object]) -> list[str]:
    drawn = [f"{about['prompts']:,} prompts"] if about["prompts"] else []
    drawn += [f"the embeddings of {about['from_image_embeddings']:,} pictures"] * bool(about["from_image_embeddings"])
    candidates = about["candidates"]
    best = f"the best of {candidates} candidates each" if candidates > 1 else "one candidate each"
    return [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=quiet>Drawn from {' and '.join(drawn) or 'nothing'}, {best}, on {about['date']}.</p>",
    ]


def _table(figures: Sequence[Figure]) -> str:
    rows, before = [], ""
    for figure in figures:
        if figure.source != before:
            rows.append(f"<tr><th colspan=5>{html.escape(figure.source.capitalize())}</th></tr>")
            before = figure.source
        name = f'<span title="{html.escape(EXPLAINED[figure.name])}">{_title(figure.name)} {figure.arrow}</span>'
        kind = "note" if "bias" in figure.note else "quiet"
        note = f"<br><span class={kind}>{html.escape(figure.note)}</span>" if figure.note else ""
        rows.append(
            f"<tr><td>{name}</td><td class=number>{figure.shown}</td><td class=short>{figure.interval}</td>"
            f"<td class=short>{figure.counts}</td><td>{html.escape(figure.features)}{note}</td></tr>"
        )
    head = "<tr><th>Metric</th><th>Value</th><th>95 % interval</th><th>Drawn, against real</th><th>Features</th></tr>"
    names = dict.fromkeys(figure.name for figure in figures)
    used = [f"<b>{_title(name)}</b>: {EXPLAINED[name]}." for name in names]
    return f"<h2>Figures</h2>{_scrolling(head, rows)}<p class=quiet>{'<br>'.join(used)}</p>"


def _scrolling(head: str, rows: Sequence[str]) -> str:
    """A table that scrolls sideways on a narrow screen."""
    return f"<div class=wide><table>{head}{''.join(rows)}</table></div>"


def _title(name: str) -> str:
    return name[0].upper() + name[1:]


def _comparison(other: Mapping[str, object], found: Sequence) -> list[str]:
    rows = []
    for difference in found:
        own, theirs = difference.own, difference.other
        kind = next((word for word in ("better", "worse") if difference.shown.endswith(word)), "quiet")
        rows.append(
            f"<tr><td>{_title(own.source)}: {own.name} {own.arrow}</td><td class=number>{own.shown}</td>"
            f"<td>{theirs.shown}</td><td class={kind}>{html.escape(difference.shown)}</td>"
            f"<td>{html.escape(own.features)}</td></tr>"
        )
    name = html.escape(str(other.get("model", "the other model")))
    head = f"<tr><th>Metric</th><th>This model</th><th>{name}</th><th>Difference</th><th>Features</th></tr>"
    return [f"<h2>Beside {name}</h2>{_scrolling(head, rows)}"]


def _different(about: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """What two evaluations do not have in common, as far as the other's report says."""
    hashes = {name: f"{name}_sha256" for name in ("images", "prompts", "training")}
    return [name for name, key in hashes.items() if about[key] != other.get(key, about[key])]


def _side_by_side(
    evaluation: Evaluation, about: Mapping[str, object], other: Mapping[str, object], folder: Path
) -> list[str]:
    """Samples of both models, if the other's pictures are where its report is."""
    if FROM_PROMPTS not in evaluation.drawn or "prompts" in _different(about, other):
        return []
    pairs = []
    for prompt, path in zip(evaluation.prompts[:PAIRS], evaluation.drawn[FROM_PROMPTS].paths[:PAIRS], strict=True):
        theirs = folder / path.parent.name / path.name
        if theirs.is_file():
            pairs.append(_figure([_square(path), _square(theirs)], prompt))
    name = html.escape(str(other.get("model", "the other model")))
    return [f"<h2>Samples, and those of {name}</h2>{_grid(pairs)}"] if pairs else []


def _samples(evaluation: Evaluation) -> list[str]:
    return _captioned(evaluation, "Samples", range(min(SHOWN, len(evaluation.prompts))))


def _hardest_prompts(evaluation: Evaluation) -> list[str]:
    return _captioned(evaluation, "Hardest prompts, by CLIP score", _hardest(evaluation))


def _captioned(evaluation: Evaluation, title: str, numbers: Sequence[int]) -> list[str]:
    """What was drawn of the prompts with these numbers."""
    if not numbers:
        return []
    drawn, prompts = evaluation.drawn[FROM_PROMPTS], evaluation.prompts
    shown = [_figure([_square(drawn.paths[i])], f"{prompts[i]} ({drawn.scores[i]:.1f})") for i in numbers]
    return [f"<h2>{title}</h2><div class=grid>{''.join(shown)}</div>"]


def _pairs(evaluation: Evaluation) -> list[str]:
    """Drawn pictures beside their nearest training pictures and their sources, and pictures beside reconstructions."""
    body = []
    for source, drawn in evaluation.drawn.items():
        pairs = [
            _figure(
                [_square(drawn.paths[i]), _square(evaluation.training[drawn.neighbours[i]])],
                f"{drawn.distances[i]:.2f} of the usual distance",
            )
            for i in _closest(drawn)
        ]
        kind = "real" if evaluation.training is evaluation.images else "training"
        body.append(f"<h2>{source.capitalize()}: the closest to a {kind} picture, and that picture</h2>{_grid(pairs)}")
    if FROM_PICTURES in evaluation.drawn:
        drawn = evaluation.drawn[FROM_PICTURES].paths[:PAIRS]
        sources = evaluation.sources[:PAIRS]
        pairs = [_figure([_square(real), _square(path)], "") for real, path in zip(sources, drawn, strict=True)]
        body.append(f"<h2>Pictures, and what is drawn from their embeddings</h2>{_grid(pairs)}")
        body += _reconstructions(evaluation)
    return body


@torch.inference_mode()
def _reconstructions(evaluation: Evaluation) -> list[str]:
    """The first pictures and those with the lowest PSNR, beside their reconstructions."""
    vqgan, body = evaluation.model.vqgan, []
    worst = evaluation.psnr.argsort()[:PAIRS].tolist()
    chosen = {"Reconstructions": range(min(PAIRS, len(evaluation.sources))), "Worst reconstructions, by PSNR": worst}
    for title, numbers in chosen.items():
        real = [resized_square(load_picture(evaluation.sources[i]), evaluation.resolution) for i in numbers]
        decoded = to_pil(vqgan.decode(vqgan.encode(to_tensor(real).to(evaluation.model.device))))
        pairs = [_figure(pair, f"{evaluation.psnr[i]:.1f} dB") for i, *pair in zip(numbers, real, decoded, strict=True)]
        body.append(f"<h2>{title}</h2>{_grid(pairs)}")
    return body


def _foot(about: Mapping[str, object]) -> list[str]:
    left = {name: value for name, value in about.items() if name != "hardest_prompts"}
    return [f"<h2>Settings and versions</h2><pre>{html.escape(json.dumps(left, indent=2, ensure_ascii=False))}</pre>"]


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="grid pairs">{"".join(figures)}</div>'


def _square(path: Path) -> Image.Image:
    picture = load_picture(path, 3 * MAX_SIDE)
    return resized_square(picture, min(MAX_SIDE, *picture.size))


def _figure(pictures: Sequence[Image.Image], caption: str) -> str:
    images = "".join(f'<img src="{_data_url(picture)}" alt="">' for picture in pictures)
    images = images if len(pictures) == 1 else f"<div class=two>{images}</div>"
    return f"<figure>{images}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "webp", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
