"""What is measured and how it is told: seconds of ours beside those of a plain reference, and the machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from clip_gen.hardware import choose_dtype

COLUMNS = ("what", "ours", "plain", "ratio", "share", "bar")


@dataclass(frozen=True)
class Figure:
    """Seconds of ours, beside those of the plain reference where there is one, and what is wanted of them."""

    name: str
    ours: float
    plain: float | None = None
    least_ratio: float | None = None  # the bar: how many times as fast as the reference
    hoped_ratio: float | None = None
    most_seconds: float | None = None  # or how long it may take at most
    share: float | None = None  # of the whole that it is a part of

    @property
    def ratio(self) -> float | None:
        return None if self.plain is None else self.plain / self.ours

    @property
    def met(self) -> bool | None:
        """Whether it passes its bar; None without one."""
        if self.least_ratio is not None:
            return self.ratio is not None and self.ratio >= self.least_ratio
        return None if self.most_seconds is None else self.ours <= self.most_seconds

    def cells(self) -> dict[str, str]:
        """Text for the columns that it has something to say in."""
        cells = {"what": self.name, "ours": f"{self.ours:.4g} s"}
        if self.plain is not None:
            cells |= {"plain": f"{self.plain:.4g} s", "ratio": f"{self.ratio:.1f}×"}
        if self.share is not None:
            cells["share"] = f"{100 * self.share:.1f} %"
        if self.met is not None:
            bar = f"at most {self.most_seconds:g} s" if self.least_ratio is None else f"{self.least_ratio:g}× or more"
            hoped = "" if self.hoped_ratio is None else f", {self.hoped_ratio:g}× hoped for"
            cells["bar"] = f"{bar}{hoped}: {'met' if self.met else 'MISSED'}"
        return cells


def table(figures: Sequence[Figure]) -> str:
    """Markdown, without the columns that stay empty."""
    rows = [figure.cells() for figure in figures]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The least of several runs, after one that sets everything up."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def machine(device: torch.device) -> dict[str, object]:
    """What the figures hold for."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(choose_dtype(None, device)).removeprefix("torch."),
        "torch": torch.__version__,
        "cog": version("cog"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """Its model name, as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def keep(path: Path, part: str, machine: dict[str, object], figures: Sequence[Figure]) -> None:
    """Puts a part into the JSON file, in the place of its earlier figures; those of other parts stay."""
    found = json.loads(path.read_text()) if path.exists() else {}
    rows = [{**asdict(figure), "ratio": figure.ratio, "met": figure.met} for figure in figures]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    found[part] = {"machine": machine, "seconds": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
