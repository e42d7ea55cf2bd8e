"""Curves of a training, drawn with Matplotlib: each value that a stage logs, with its name, unit and meaning."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INCHES = (4.7, 2.7)
COLOURS = ("#2563eb", "#dc2626")
SMOOTHED_FROM = 60  # points; noisier curves get a running mean over a thirtieth of them


@dataclass(frozen=True)
class Chart:
    """One chart. lines: the logged names, with their words in the legend. factor: from logged values to the unit."""

    title: str
    unit: str
    lines: Mapping[str, str]
    meaning: str
    factor: float = 1.0


RATE = Chart(
    "Learning rate", "learning rate", {"learning_rate": "AdamW's"}, "It rises at the start and then falls to the end."
)
DISTANCES = (
    Chart(
        "FID of held-back pictures",
        "FID (no unit)",
        {"fid_inception": "features of InceptionV3", "fid_clip": "features of the base's CLIP"},
        "Distance between the held-back pictures and what the networks make of them, as sets. Lower is better. Few "
        "pictures make it too high, so compare it within this training only.",
    ),
    Chart(
        "CMMD of held-back pictures",
        "CMMD (no unit)",
        {"cmmd": "CLIP embeddings"},
        "The same question, asked of CLIP embeddings. Lower is better.",
    ),
)
CHARTS = {
    "vqgan": (
        Chart(
            "Quality of reconstructions",
            "PSNR (dB)",
            {"val_psnr": "held-back pictures", "val_mean_colour_psnr": "their mean colours"},
            "How close held-back pictures come back from their tokens: peak signal-to-noise ratio. Higher is better. "
            "Published VQGANs reach about 20 dB on photographs. Pale and plain pictures are high with any VQGAN, so "
            "compare with what each picture's mean colour alone would have.",
        ),
        Chart(
            "Error of pixels",
            "mean error (% of black to white)",
            {"l1": "pictures in training"},
            "Mean absolute difference between a picture and its reconstruction (l1 in the log). Lower is better.",
            factor=50.0,  # pixels are in [-1, 1]
        ),
        Chart(
            "Perceptual error",
            "distance (no unit)",
            {"perceptual": "pictures in training"},
            "How far features of a picture and of its reconstruction are apart, as LPIPS or CLIP see them. Lower is "
            "better.",
        ),
        Chart(
            "Loss of stage 1",
            "loss (no unit)",
            {"loss": "pictures in training"},
            "What the optimizer lowers: errors of pixels and features, the distance to the codes, and from halfway on "
            "the losses of the discriminator, which make it jump.",
        ),
        Chart(
            "Discriminator",
            "loss (no unit)",
            {"fooled": "minus its score of reconstructions", "told_apart": "its own loss"},
            "A second network that tells pictures from reconstructions. Where its own loss is near 1, it cannot. The "
            "VQGAN lowers the first line, the discriminator the second.",
        ),
        Chart(
            "Codes in use",
            "share of the codebook (%)",
            {"codes_in_batch": "in one batch"},
            "How many of the codes appear in a batch. Few codes make coarse pictures.",
            factor=100.0,
        ),
        Chart(
            "Spread of the codes",
            "perplexity (codes)",
            {"perplexity": "in one batch"},
            "The number of codes that would be as hard to guess if all were equally frequent. Higher is better.",
        ),
        *DISTANCES,
        RATE,
    ),
    "gpt": (
        Chart(
            "Loss of stage 2",
            "nats per token",
            {"loss": "in training", "val_loss": "held-back pictures"},
            "How surprised the transformer is by the next token. Lower is better. In training it sees noisy embeddings "
            "or none. If the line of held-back pictures rises, it learns the pictures by heart; the best weights are "
            "kept.",
        ),
        Chart(
            "Do drawings follow their embeddings?",
            "share recognised (%)",
            {"recognised": "what is drawn of held-back pictures"},
            "Share of drawings that CLIP finds nearest to the held-back picture from whose embedding they were drawn, "
            "among those in the table above.",
            factor=100.0,
        ),
        Chart(
            "Contrast",
            "nats per picture",
            {"contrast": "in training"},
            "How hard a picture is to tell from a similar one by its embedding. Lower is better.",
        ),
        Chart(
            "Embedding loss",
            "1 minus cosine (no unit)",
            {"embedding": "in training"},
            "Distance between a picture's embedding and that of the picture that the likeliest tokens give. Lower is "
            "better.",
        ),
        *DISTANCES,
        RATE,
    ),
}


def charts(stage: str, history: Sequence[Mapping[str, float]]) -> list[str]:
    """HTML figures of what the history has two or more values of.

    history: see read_history(). Without Matplotlib the result is a sentence that says so.
    """
    figures = []
    for chart in CHARTS[stage]:
        lines = {words: _points(history, name, chart.factor) for name, words in chart.lines.items()}
        lines = {words: points for words, points in lines.items() if len(points) > 1}
        if lines:
            try:
                picture = base64.b64encode(draw(chart, lines).encode()).decode()
            except ImportError:
                return ["<p>Curves need Matplotlib, which script/setup installs.</p>"]
            image = f'<img src="data:image/svg+xml;base64,{picture}" alt="{html.escape(chart.title)}">'
            figures.append(f"<figure>{image}<figcaption>{html.escape(chart.meaning)}</figcaption></figure>")
    return figures


def draw(chart: Chart, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """The SVG of a chart. lines: points (step, value in the chart's unit) by their words in the legend."""
    from matplotlib import rc_context  # only here: importing it takes time
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    style = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(INCHES)
        figure.subplots_adjust(left=0.16, right=0.96, bottom=0.24, top=0.9)  # quicker than Matplotlib's own layouts
        axes = figure.add_subplot()
        # Not strict: a chart has one line or two, and there are two colours.
        for (words, points), colour in zip(lines.items(), COLOURS, strict=False):
            _line(axes, words, points, colour)
        axes.set(title=chart.title, ylabel=chart.unit)
        axes.set_xlabel("step", loc="right", labelpad=1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        figure.legend(loc="lower center", ncols=len(lines), frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    return file.getvalue()


def _line(axes: Any, words: str, points: Sequence[tuple[int, float]], colour: str) -> None:
    steps, values = zip(*points, strict=True)
    if len(points) < SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, label=words, marker="o" if len(points) < 12 else "", markersize=3)
        return
    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(steps, _running_mean(values, len(values) // 30), color=colour, label=words)


def _running_mean(values: Sequence[float], before: int) -> list[float]:
    """The mean of each value and of so many before it."""
    windows = [values[max(0, i - before) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _points(history: Sequence[Mapping[str, float]], name: str, factor: float) -> list[tuple[int, float]]:
    """The finite values of a name over the steps."""
    return [(entry["step"], factor * entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
