"""Stage 1: pictures a second and PSNR of two versions of the code, in turns.

    git archive TAG clip_gen | tar x -C /tmp/old
    .venv/bin/python -m benchmarks stage-1 --old /tmp/old --pictures photos [--clip shapes|vit] [--seconds 60]

Each version trains a new VQGAN of --size on the pictures of a folder, with all losses of a training, the discriminator
from half of its time on. It has --seconds of CPU time on one thread, without reading the pictures, of which 40 are held
back for the PSNR. The two take turns of ten steps, since a busy machine changes its speed. CLIP vit is ViT-B/32 with
random weights: as slow as OpenAI's, and good enough for a perceptual loss in both versions. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_gen.config import ClipConfig
from clip_gen.images import from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.losses import mean_decibels, reconstruction_errors
from clip_gen.training.plan import MODEL_SIZES
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANLoss, VQGANTrainer
from clip_gen.weights.model_folder import load_base

HERE = Path(__file__).parents[1]  # not that of the other version
HELD_BACK, BATCH, TURN = 40, 8, 10


def squares(folder: Path, side: int) -> torch.Tensor:
    """The centres of all pictures, (N, S, S, 3) uint8, in random order."""
    names = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg", ".webp"))
    found = []
    for path in (names[i] for i in np.random.default_rng(0).permutation(len(names))):
        picture = Image.open(path).convert("RGB")
        edge = min(picture.size)
        left, top = ((length - edge) // 2 for length in picture.size)
        found.append(np.asarray(picture.resize((side, side), box=(left, top, left + edge, top + edge))))
    return torch.from_numpy(np.stack(found))


class Run:
    """A training of stage 1 without Lightning, which takes turns by lines on its standard input."""

    def __init__(self, arguments: argparse.Namespace):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        vqgan = replace(MODEL_SIZES[arguments.size][0], codebook_size=512)
        self.seconds, self.spent, self.steps, self.durations = arguments.seconds, 0.0, 0, []
        pictures = squares(arguments.pictures, vqgan.resolution)
        self.held_back, self.pictures = pictures[:HELD_BACK], pictures[HELD_BACK:]
        clip = ClipEncoder(ClipConfig()) if arguments.clip == "vit" else load_base(HERE / "checkpoints" / "shapes").clip
        config = FitConfig(steps=10**9, learning_rate=2e-3, muon_rate=2e-3, weight_decay=0.0)
        self.stage = VQGANTrainer(VQGAN(vqgan).train(), config, VQGANLoss(0.2, 0.1), clip)
        self.stage.log_dict = lambda *_, **__: None
        self.optimizer = self.stage.configure_optimizers()["optimizer"]
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16)

    def step(self) -> None:
        began = time.process_time()
        self.stage.time_spent = self.spent / self.seconds
        for group in self.optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (self.steps + 1) / 20) * (1 - 0.99 * min(1.0, self.stage.time_spent))
        numbers = torch.from_numpy(np.random.default_rng(self.steps).integers(len(self.pictures), size=BATCH))
        with self.autocast:
            loss = self.stage.training_step(self.pictures[numbers])
        self.optimizer.zero_grad()
        loss.backward()
        self.stage.configure_gradient_clipping(self.optimizer, 1.0, None)
        self.optimizer.step()
        self.steps += 1
        self.durations.append((self.stage.time_spent, time.process_time() - began))
        self.spent += self.durations[-1][1]

    def result(self) -> dict[str, float]:
        self.stage.eval()
        with torch.no_grad():
            psnr = float(mean_decibels(reconstruction_errors(self.stage.vqgan, from_bytes(self.held_back)))[0])
        first, second = ([took for when, took in self.durations[3:] if (when >= 0.5) == late] for late in (False, True))
        rates = {
            name: round(BATCH / statistics.median(times), 2)
            for name, times in (("before the discriminator", first), ("with it", second))
            if times
        }
        return {"psnr": round(psnr, 2), "steps": self.steps, "pictures a second": rates}

    def run(self) -> None:
        for _ in sys.stdin:
            for _ in range(TURN):
                if self.spent < self.seconds:
                    self.step()
            print(self.spent >= self.seconds, flush=True)
            if self.spent >= self.seconds:
                break
        print(json.dumps(self.result()), flush=True)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks stage-1", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="a folder with another version's clip_gen")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--clip", choices=["shapes", "vit"], default="shapes")
    parser.add_argument("--size", choices=MODEL_SIZES, default="laptop")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--bfloat16", action="store_true", help="as on CPUs that multiply it")
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.turns:
        return Run(arguments).run()
    versions = {"new": HERE} | ({"old": arguments.old} if arguments.old else {})
    running = {}
    for name, folder in versions.items():
        environment = os.environ | {"PYTHONPATH": f"{folder}:{HERE}", "OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO"}
        command = [sys.executable, "-P", __file__, *words, "--turns"]
        running[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    results: dict[str, object] = {}
    while running:
        for name, process in list(running.items()):
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the {name} version failed")
            if line.strip() == "True":
                results[name] = json.loads(process.stdout.readline())
                running.pop(name).wait()
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
