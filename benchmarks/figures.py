"""Timing, tables and result files: our seconds beside those of a plain reference, and the machine."""

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

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("what", "ours", "plain", "ratio", "target")


@dataclass(frozen=True)
class Figure:
    """Our seconds, those of the plain reference if there is one, and the target if there is one.

    others: seconds of slower references, by what makes them slower.
    """

    name: str
    ours: float
    plain: float | None = None
    min_ratio: float | None = None  # target: how many times as fast as the reference
    max_seconds: float | None = None  # or target: our seconds
    others: dict[str, float] | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.plain is None else self.plain / self.ours

    @property
    def met(self) -> bool | None:
        """Whether it meets its target; None without one."""
        if self.min_ratio is not None:
            return self.ratio is not None and self.ratio >= self.min_ratio
        return None if self.max_seconds is None else self.ours <= self.max_seconds

    def cells(self) -> dict[str, str]:
        """Text by column; empty columns are left out."""
        cells = {"what": self.name, "ours": f"{self.ours:.4g} s"}
        if self.plain is not None:
            cells |= {"plain": f"{self.plain:.4g} s", "ratio": f"{self.ratio:.1f}×"}
        for name, seconds in (self.others or {}).items():
            cells[f"plain, {name}"] = f"{seconds:.4g} s, {seconds / self.ours:.1f}×"
        if self.met is not None:
            target = f"at most {self.max_seconds:g} s" if self.min_ratio is None else f"{self.min_ratio:g}× or more"
            cells["target"] = f"{target}: {'met' if self.met else 'MISSED'}"
        return cells


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table of the figures, without empty columns."""
    rows = [figure.cells() for figure in figures]
    others = {column: None for row in rows for column in row if column not in COLUMNS}  # in their order
    columns = [*COLUMNS[:-1], *others, COLUMNS[-1]]
    return markdown(rows, [column for column in columns if any(column in row for row in rows)])


def markdown(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> str:
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The shortest of several runs, after a first run that is not counted."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def machine(device: torch.device) -> dict[str, object]:
    """The hardware and the versions that the figures hold for."""
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
    """The processor's model name, from /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def save(path: Path, part: str, machine: dict[str, object], figures: Sequence[Figure]) -> None:
    """Writes the figures of one part to the JSON file; those of other parts stay."""
    results = json.loads(path.read_text()) if path.exists() else {}
    rows = [{**asdict(figure), "ratio": figure.ratio, "met": figure.met} for figure in figures]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    results[part] = {"machine": machine, "seconds": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
