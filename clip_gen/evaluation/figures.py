"""What an evaluation found: figures with intervals, as JSON and as tables, and two evaluations side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clip_gen.metrics.intervals import Estimate

BLURS = ("FID-1", "FID-2", "FID-4", "FID-8")  # FID of pictures that are blurred with this radius
LOWER_IS_BETTER = {"FID", *BLURS, "KID × 1000", "CMMD", "LPIPS"}
CLOSE_TO_TRAINING, CLOSE_TO_REAL = "close to a training picture", "close to a real picture"
NO_DIRECTION = {"density", CLOSE_TO_TRAINING, CLOSE_TO_REAL}  # 1 and 50 % are as good as can be
SHARES = {"precision", "recall", "coverage", "R-precision", CLOSE_TO_TRAINING, CLOSE_TO_REAL}
WITHOUT_BIAS = {"KID × 1000", "CLIP score", "PSNR", "SSIM", "LPIPS"}  # the others compare for equal numbers of pictures
FROM_PROMPTS, FROM_PICTURES = "from prompts", "from image embeddings"
DECIMALS = {"FID": 2, "KID × 1000": 3, "CMMD": 3, "PSNR": 2, "SSIM": 4, "LPIPS": 4, "density": 3}
SMALL_FID = 10.0


@dataclass(frozen=True)
class Figure:
    """One figure of a report. low, high: 95 % interval; None if it has none.

    source: what was measured, for example "from prompts". features: of which network; figures with others do not
    compare. pictures: how many were measured, and against how many real ones (0: none). weights: SHA-256 of a CLIP.
    """

    source: str
    name: str
    value: float
    low: float | None
    high: float | None
    features: str
    pictures: int
    real: int = 0
    note: str = ""
    weights: str = ""

    @classmethod
    def of(cls, source: str, name: str, estimate: Estimate, *rest: object) -> Figure:
        low, high = (None if math.isnan(end) else end for end in (estimate.low, estimate.high))
        return cls(source, name, estimate.value, low, high, *rest)

    @property
    def shown(self) -> str:
        return _number(self.name, self.value)

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "none"
        return f"{_number(self.name, self.low)} to {_number(self.name, self.high)}"

    @property
    def network(self) -> str:
        """Tells which features these are: a CLIP by its weights, since models with the same CLIP have other names."""
        return self.weights or self.features

    @property
    def counts(self) -> str:
        return f"{self.pictures:,} against {self.real:,}" if self.real else f"{self.pictures:,}"

    @property
    def arrow(self) -> str:
        return "" if self.name in NO_DIRECTION else "↓" if self.name in LOWER_IS_BETTER else "↑"


def _number(name: str, value: float, like: float | None = None) -> str:
    """With as many digits as the field prints; more for small FIDs, as those of unit-length features are.

    like: a value whose number of digits to use.
    """
    if name in SHARES:
        return f"{100 * value:.1f} %"
    is_small = name.startswith("FID") and abs(value if like is None else like) < SMALL_FID
    return f"{value:.{4 if is_small else DECIMALS.get(name, 2)}f}"


@dataclass(frozen=True)
class Difference:
    """A figure of two evaluations. exceeds: whether they differ by more than chance, at 95 %; None if unknown.
    obstacle: why they do not compare; empty if they do.
    """

    own: Figure
    other: Figure
    exceeds: bool | None
    obstacle: str = ""

    @property
    def shown(self) -> str:
        own, other, name = self.own, self.other, self.own.name
        if self.obstacle:
            return f"do not compare: {self.obstacle}"
        change = own.value - other.value
        change = f"{'+' if change > 0 else ''}{_number(name, change, own.value)}"
        change = change.replace(" %", " points")
        if self.exceeds is None:
            return f"{change}, without an interval"
        better = (own.value < other.value) == (name in LOWER_IS_BETTER)
        verdict = "" if name in NO_DIRECTION else ", better" if better else ", worse"
        return f"{change}{verdict}" if self.exceeds else f"{change}, within the intervals"


def differences(own: Sequence[Figure], others: Sequence[Figure], different: Collection[str] = ()) -> list[Difference]:
    """The figures that both evaluations have. The interval of a difference is the root of both half widths' squares.

    different: what the evaluations do not have in common, of "images", "prompts" and "training".
    """
    by_name = {(figure.source, figure.name): figure for figure in others}
    found = []
    for figure in own:
        other = by_name.get((figure.source, figure.name))
        if other is None:
            continue
        exceeds, obstacle = None, _obstacle(figure, other, different)
        if not obstacle and None not in (figure.low, figure.high, other.low, other.high):
            half = math.hypot((figure.high - figure.low) / 2, (other.high - other.low) / 2)
            exceeds = abs(figure.value - other.value) > half
        found.append(Difference(figure, other, exceeds, obstacle))
    return found


def _obstacle(own: Figure, other: Figure, different: Collection[str]) -> str:
    """Why two figures do not compare; empty if they do."""
    if own.network != other.network:
        names = {own.features, other.features}
        return f"{own.features}, {other.features}" if len(names) == 2 else f"{own.features} with other weights"
    if "training" in different and own.name == CLOSE_TO_TRAINING:
        return "other training pictures"
    if "images" in different and (own.real or own.source != FROM_PROMPTS) and own.name != CLOSE_TO_TRAINING:
        return "other real pictures"
    if "prompts" in different and own.source == FROM_PROMPTS:
        return "other prompts"
    if own.name not in WITHOUT_BIAS and (own.pictures, own.real) != (other.pictures, other.real):
        return f"{own.counts} and {other.counts} pictures"
    return ""


def as_markdown(title: str, figures: Sequence[Figure], lines: Sequence[str] = ()) -> str:
    """A table for a model card, and lines below it."""
    rows = [
        f"| {f.source} | {f.name} {f.arrow} | {f.shown} | {f.interval} | {f.counts} | {f.features} | {f.note} |"
        for f in figures
    ]
    head = [f"## {title}", "", "| pictures | metric | value | 95 % interval | number | features | |", "|---" * 7 + "|"]
    return "\n".join([*head, *rows, *([""] if lines else []), *lines]) + "\n"


def as_text(figures: Sequence[Figure]) -> str:
    """A table for a terminal."""
    width = max(len(f"{f.source}, {f.name}") for f in figures)
    return "\n".join(
        f"{f.source + ', ' + f.name:<{width}}  {f.shown:>9}  ({f.interval})  {f.counts}; {f.features}"
        + (f"; {f.note}" if f.note else "")
        for f in figures
    )


def comparison_text(name: str, other: str, found: Sequence[Difference]) -> str:
    width = max((len(f"{d.own.source}, {d.own.name}") for d in found), default=0)
    lines = [f"{name} beside {other}:"]
    lines += [
        f"{d.own.source + ', ' + d.own.name:<{width}}  {d.own.shown:>9}  {d.other.shown:>9}  {d.shown}"
        + (f"; {d.own.features}" if d.own.features not in d.shown else "")
        for d in found
    ]
    return "\n".join(lines)


def as_json(figures: Sequence[Figure], about: Mapping[str, object]) -> str:
    return json.dumps({**about, "figures": [asdict(figure) for figure in figures]}, indent=1, ensure_ascii=False) + "\n"


def _read_figure(values: Mapping[str, object]) -> Figure:
    """TypeError for values of other types than as_json writes."""
    figure = Figure(**values)
    for name, allowed in (
        ("value", (int, float)),
        ("low", (int, float, type(None))),
        ("high", (int, float, type(None))),
    ):
        if not isinstance(getattr(figure, name), allowed):
            raise TypeError
    return figure


def read_report(path: Path) -> tuple[dict[str, object], list[Figure]]:
    """What as_json wrote. ValueError for another file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        figures = [_read_figure(figure) for figure in report.pop("figures")]
        if not figures:
            raise ValueError
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the report.json of an evaluation") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is not the report of an evaluation on pictures; give the report.json that evaluate --images wrote"
        ) from error
    return report, figures
