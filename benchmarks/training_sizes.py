"""Memory and pictures a second of training each size, with and without gradient checkpointing.

    .venv/bin/python -m benchmarks training-sizes [--sizes laptop small] [--stages 1 2] [--steps 3]

Each case is a process of its own with random pictures, or random tokens, and the batches that a training has on such a
machine: a few steps with all losses and the optimizer, in bfloat16 where the hardware multiplies it. CLIP is ViT-B/32
with random weights. On a CPU: the peak memory of the whole process, and pictures for each second of CPU time on one
thread. On a GPU: the peak memory of torch, and pictures a second. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from torch import Tensor

from clip_gen.config import ClipConfig
from clip_gen.files import ROOT
from clip_gen.hardware import choose_device, prefers_bfloat16
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.plan import MODEL_SIZES
from clip_gen.training.stage import FitConfig, Stage
from clip_gen.training.vqgan_trainer import VQGANLoss, VQGANTrainer

BATCHES = {"cpu": {1: 8, 2: 16}, "cuda": {1: 16, 2: 16}}


def prepared(size: str, stage: int, is_checkpointed: bool, batch: int) -> tuple[Stage, object]:
    """A stage and a random batch for it."""
    (vqgan, gpt), generator = MODEL_SIZES[size], torch.manual_seed(0)
    config = FitConfig(learning_rate=1e-4, muon_rate=1e-4, gradient_checkpointing=is_checkpointed)
    if stage == 1:
        loss = VQGANLoss(0.2, 0.1, adversarial_from=0.0)
        trainer = VQGANTrainer(VQGAN(vqgan).train(), config, loss, ClipEncoder(ClipConfig()))
        shape = batch, vqgan.resolution, vqgan.resolution, 3
        return trainer, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    gpt = replace(gpt, block_size=vqgan.grid**2)
    embeddings = torch.randn(batch, gpt.embed_dim)
    tokens = torch.randint(0, gpt.codebook_size, (batch, gpt.block_size))
    return GPTTrainer(GPT(gpt).train(), config), (embeddings, tokens, torch.zeros(batch).bool(), *[embeddings] * 2)


def one_case(size: str, stage: int, is_checkpointed: bool, steps: int) -> dict[str, float]:
    device = choose_device()
    torch.set_num_threads(1)
    on_gpu, count = device.type == "cuda", BATCHES[device.type][stage]
    trainer, batch = prepared(size, stage, is_checkpointed, count)
    trainer.log_dict = lambda *_, **__: None
    trainer.to(device)
    for network in trainer.frozen:
        network.to(device)
    batch = batch.to(device) if isinstance(batch, Tensor) else tuple(part.to(device) for part in batch)
    optimizer = trainer.configure_optimizers()["optimizer"]
    clock, times = time.perf_counter if on_gpu else time.process_time, []
    for _ in range(steps):
        began = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=prefers_bfloat16(device, training=True)):
            loss = trainer.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(clock() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"gigabytes": peak / 1e9, "pictures a second": count / statistics.median(times[1:] or times)}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks training-sizes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=MODEL_SIZES, default=list(MODEL_SIZES))
    parser.add_argument("--stages", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", nargs="+", type=int, choices=[0, 1], default=[0, 1])
    parser.add_argument("--one-case", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    cases = [(s, n, c) for s in arguments.sizes for n in arguments.stages for c in arguments.checkpointing]
    if arguments.one_case:
        [(size, stage, is_checkpointed)] = cases
        print(json.dumps(one_case(size, stage, bool(is_checkpointed), arguments.steps)))
        return
    print("| size | stage | gradient checkpointing | GB | pictures a second |\n|---|---|---|---|---|", flush=True)
    for size, stage, is_checkpointed in cases:
        case = ["--sizes", size, "--stages", str(stage), "--checkpointing", str(is_checkpointed), "--one-case"]
        command = [sys.executable, "-m", "benchmarks", "training-sizes", *case, "--steps", str(arguments.steps)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        gigabytes, rate = json.loads(done.stdout.splitlines()[-1]).values()
        print(f"| {size} | {stage} | {'on' if is_checkpointed else 'off'} | {gigabytes:.2f} | {rate:.2f} |", flush=True)
