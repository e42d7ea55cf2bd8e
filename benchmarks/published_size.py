"""Seconds and memory of importing, loading and predicting with a model of the published size.

    .venv/bin/python -m benchmarks published-size --out /tmp/published

Writes files in HFAiLab's and OpenAI's formats and full size with random weights, 2 GB, then runs each step in a new
process with --threads threads. Targets for 2 cores: import in 2 minutes and 6 GB, load in 15 s, predict in 8 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.figures import markdown
from clip_gen.config import ClipConfig
from clip_gen.files import ROOT
from clip_gen.networks.clip_encoder import build_clip

SHAPES = ROOT / "tests" / "fixtures" / "hfailab" / "published_keys.json"
TARGETS = {"import": (120.0, 6e9), "load": (15.0, 8e9), "predict": (None, 8e9)}  # seconds, bytes

LOAD = "from clip_gen import ClipGen; import sys; ClipGen.load(sys.argv[1], 'cpu')"
PREDICT = (
    "from clip_gen import ClipGen; import sys; "
    "ClipGen.load(sys.argv[1], 'cpu').generate('a cat', candidates=16, num_outputs=4, top_k=500, top_p=0.95, seed=0)"
)


def write_files(folder: Path) -> None:
    """gpt.pt, vqgan.pt and clip.pt with random weights in the published formats."""
    generator = torch.Generator().manual_seed(0)
    for part, shapes in json.loads(SHAPES.read_text()).items():
        if not (folder / f"{part}.pt").exists():
            tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
            torch.save({"model": tensors, "epoch": 1, "step": 0}, folder / f"{part}.pt")
    if not (folder / "clip.pt").exists():
        torch.save(build_clip(ClipConfig()).half().state_dict(), folder / "clip.pt")


def _random(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    if name.endswith("mask"):
        return torch.ones(shape, dtype=torch.bool).triu(1)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    return torch.randn(shape, generator=generator) * 0.02


def measured(words: list[str], threads: int) -> tuple[float, int]:
    """Seconds and peak memory in bytes of one process, which must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        # Not resource.getrusage, whose peak of a child includes the memory of its parent before exec.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)[:80]} ended with status {process.returncode}")
    return time.monotonic() - started, peak


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks published-size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for 5 GB of files; existing ones are reused")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_files(arguments.out)
    rows = [
        {
            "step": "python and torch alone",
            **_row("import", measured(["-c", "import clip_gen.pipeline"], arguments.threads)),
        }
    ]
    for dtype in arguments.dtypes:
        model = str(arguments.out / f"coco-{dtype}")
        files = [word for part in ("gpt", "vqgan", "clip") for word in (f"--{part}", str(arguments.out / f"{part}.pt"))]
        steps = {
            "import": ["-m", "clip_gen", "import", "hfailab", *files, "--out", model, "--dtype", dtype],
            "load": ["-c", LOAD, model],
            "predict": ["-c", PREDICT, model],
        }
        for step, words in steps.items():
            rows.append({"step": f"{step}, {dtype}", **_row(step, measured(words, arguments.threads))})
            print(rows[-1], file=sys.stderr)
    print(markdown(rows, list(rows[0])))
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


def _row(step: str, figures: tuple[float, int]) -> dict[str, object]:
    seconds, memory = figures
    max_seconds, max_memory = TARGETS[step]
    met = (max_seconds is None or seconds < max_seconds) and memory < max_memory
    return {"seconds": round(seconds, 1), "peak GB": round(memory / 1e9, 2), "target met": met}
