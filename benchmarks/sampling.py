"""Drawing tokens, and a whole prediction, beside a plain loop that recomputes the whole sequence for every token.

    .venv/bin/python benchmarks/sampling.py [--size bundled published] [--device cpu] [--json sampling.json]

bundled: checkpoints/shapes. published: HFAiLab's size, 24 layers of 1,024, with random weights. The plain loop is
float32, without a cache, in the batch that suits it best; a published picture takes it minutes, so it is timed at a few
lengths and the rest is read off the line between them. Seconds for one candidate alone and for each of sixteen.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.config import GPTConfig
from clip_gen.gpt import GPT
from clip_gen.pipeline import choose_device, choose_dtype
from clip_gen.sampling import Sampling, candidate_uniforms, sample_tokens

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = GPTConfig(n_layer=24, n_head=16, n_embd=1024, block_size=256, codebook_size=16384, embed_dim=512)
LENGTHS = (1, 32, 64, 128, 192, 255)  # tokens already there, at which the plain loop is timed


def seconds(work: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """The least of several runs, after one that sets everything up."""
    work()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken)


@torch.inference_mode()
def plain_seconds(gpt: GPT, device: torch.device, batch: int, times: int) -> float:
    """Seconds a candidate takes the plain loop in batches of this size."""
    embedding = F.normalize(torch.randn(batch, gpt.config.embed_dim, device=device), dim=1)
    lengths = [length for length in LENGTHS if length < gpt.config.block_size]
    taken = []
    for length in lengths:
        tokens = torch.randint(0, gpt.config.codebook_size, (batch, length), device=device)

        def step(tokens: torch.Tensor = tokens) -> torch.Tensor:
            return gpt(embedding, tokens)[:, -1].softmax(dim=1).multinomial(1)

        taken.append(seconds(step, device, times))
    return float(np.interp(range(gpt.config.block_size), lengths, taken).sum()) / batch


def measure(gpt: GPT, device: torch.device, dtype: torch.dtype, batches: list[int], times: int) -> dict[str, float]:
    plain = {batch: plain_seconds(gpt, device, batch, times) for batch in batches}
    gpt.work_in(dtype)
    embedding = F.normalize(torch.randn(1, gpt.config.embed_dim, device=device), dim=1)

    def ours(count: int) -> float:
        uniforms = candidate_uniforms(0, range(count), gpt.config.block_size)
        rows = embedding.expand(count, -1)
        return seconds(lambda: sample_tokens(gpt, rows, uniforms, Sampling()), device, times)

    one, sixteen = ours(1), ours(16) / 16
    best = min(plain.values())
    return {
        **{f"plain, batch {batch}": value for batch, value in plain.items()},
        "ours, one alone": one,
        "ours, each of 16": sixteen,
        "ratio, one alone": plain[1] / one,
        "ratio, each of 16": best / sixteen,
    }


def prediction(device: torch.device) -> dict[str, float]:
    """A prediction of 16 candidates by the bundled model, in a warm process, to pictures in memory."""
    model = ClipGen.load(ROOT / "checkpoints" / "shapes", device.type)
    return {"prediction of 16": seconds(lambda: model.generate("a large red circle", seed=0), device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=["bundled", "published"], default=["bundled", "published"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    dtype = choose_dtype("auto", device)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(machine)
    results: dict[str, dict[str, float]] = {}
    for size in arguments.size:
        torch.manual_seed(0)
        if size == "bundled":
            gpt = ClipGen.load(ROOT / "checkpoints" / "shapes", device.type, "float32").gpt
            results[size] = measure(gpt, device, dtype, [1, 4, 16], 3) | prediction(device)
        else:
            gpt = GPT(PUBLISHED).eval().requires_grad_(False).to(device)
            results[size] = measure(gpt, device, dtype, [1, 4], 1)
        for name, value in results[size].items():
            print(f"{size:10} {name:20} {value:8.2f}{'x' if 'ratio' in name else ' s'}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "seconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
