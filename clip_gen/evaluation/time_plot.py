"""A plot of quality against seconds a picture, as SVG: CLIP-GEN's candidates beside optimisation against CLIP."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

INCHES = (6.4, 3.6)
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
    """An SVG of one plot: its title, and series, each with a name and points (seconds, value, low, high, label).

    low and high may be None. Seconds are on a logarithmic scale.
    """
    from matplotlib import rc_context  # only here: importing it takes time
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    style = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(INCHES, layout="constrained")
        axes = figure.add_subplot(xscale="log", title=plot["title"], xlabel="seconds a picture")
        for number, series in enumerate(plot["series"]):
            points = sorted(series["points"], key=lambda point: point["seconds"])
            seconds, values = ([point[name] for point in points] for name in ("seconds", "value"))
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(seconds, values, "o-", color=colour, label=series["name"])
            for point in points:
                place = (point["seconds"], point["value"])
                axes.annotate(point["label"], place, xytext=(6, 5), textcoords="offset points")
                if point.get("low") is not None:
                    axes.vlines(point["seconds"], point["low"], point["high"], color=colour)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=len(plot["series"]), frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]
