"""A plot of quality against seconds a picture, as SVG: CLIP-GEN's candidates beside optimisation against CLIP."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 360, 64, 56, 40
COLOURS = ("#0b6e99", "#c2571a", "#5a7d2a", "#7a4fa0")


def read_points(path: Path) -> list[dict[str, object]]:
    """The plots in the results that `optimise` wrote, for time_plot. ValueError for another file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["plots"]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give what optimise wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: holds no plots; give what optimise wrote") from error


def time_plot(plot: Mapping[str, object]) -> str:
    """An SVG of one plot: title, y (its label), and series, each with a name and points (seconds, value, low, high,
    label). Seconds are on a logarithmic scale.
    """
    points = [point for series in plot["series"] for point in series["points"]]
    seconds = [point["seconds"] for point in points]
    first, last = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
    low, high = (function(end) for function, end in ((min, _ends(points, "low")), (max, _ends(points, "high"))))
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - first) / max(1, last - first) * (WIDTH - LEFT - 20)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = [f'<text x="{LEFT}" y="18" font-weight="600">{html.escape(plot["title"])}</text>']
    drawn += [_tick(x(10.0**power), f"{10.0**power:g}") for power in range(first, last + 1)]
    drawn += [_line(y(low + (high - low) * i / 4), low + (high - low) * i / 4) for i in range(5)]
    drawn.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 22}" text-anchor="middle">seconds a picture</text>')
    for number, series in enumerate(plot["series"]):
        drawn += _series(series, COLOURS[number % len(COLOURS)], x, y)
        place = LEFT + 200 * number
        drawn.append(f'<circle cx="{place + 6}" cy="{HEIGHT - 8}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        drawn.append(f'<text x="{place + 16}" y="{HEIGHT - 4}">{html.escape(series["name"])}</text>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#222"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style} role="img">{"".join(drawn)}</svg>'


def _ends(points: Sequence[Mapping[str, float]], end: str) -> list[float]:
    return [point["value"] if point.get(end) is None else point[end] for point in points]


def _tick(x: float, label: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>'
    return f'{line}<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'


def _line(y: float, value: float) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'


def _series(series: Mapping[str, object], colour: str, x: object, y: object) -> list[str]:
    points = sorted(series["points"], key=lambda point: point["seconds"])
    places = " ".join(f"{x(point['seconds']):.1f},{y(point['value']):.1f}" for point in points)
    drawn = [f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{places}"/>']
    for point in points:
        across, down = x(point["seconds"]), y(point["value"])
        if point.get("low") is not None:
            ends = f'y1="{y(point["low"]):.1f}" y2="{y(point["high"]):.1f}"'
            drawn.append(f'<line x1="{across:.1f}" x2="{across:.1f}" {ends} stroke="{colour}"/>')
        drawn.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{colour}"/>')
        drawn.append(f'<text x="{across + 7:.1f}" y="{down - 6:.1f}">{html.escape(point["label"])}</text>')
    return drawn
