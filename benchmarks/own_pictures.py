"""Training on a zip of pictures: quality from scratch, fine-tuning to a new style, and memory.

    .venv/bin/python -m benchmarks own-pictures scratch --out /tmp/scratch [--minutes 44] [--pictures 2000]
    .venv/bin/python -m benchmarks own-pictures style --out /tmp/style [--minutes 10] [--pictures 300]
    .venv/bin/python -m benchmarks own-pictures memory --out /tmp/memory [--pictures 20000]

scratch: trains new networks of size laptop for the bundled CLIP on plain shapes, shifted but not cropped, since crops
make shapes of sizes that the judge does not know. Prints the PSNR of reconstructions and the share of codes used on
unseen pictures, and the share of one-object prompts that the judge calls right, best of 16.
style: fine-tunes the bundled model on outlined shapes. Prints the share of foreground in the outline's colour and the
share of outlined pictures: before, after, and in the training pictures. sheet.png has before above after.
memory: a few steps of both stages on 200 pictures and on many; prints the peak memory of all processes together.
Other options go to `python -m clip_gen train`. Each writes result.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.models import BUNDLED
from clip_gen import ClipGen
from clip_gen.files import ROOT
from clip_gen.images import from_bytes
from clip_gen.metrics.reconstruction import decibels, squared_errors
from clip_gen.sampling.sampler import Sampling
from clip_gen.serving.train_process import TRAIN_ENVIRONMENT
from clip_gen.worlds.grading import Evaluation
from clip_gen.worlds.shapes.folder import write_pictures
from clip_gen.worlds.shapes.grading import WORLD
from clip_gen.worlds.shapes.judge import MIN_FOREGROUND
from clip_gen.worlds.shapes.pairs import RenderedPictures
from clip_gen.worlds.shapes.prompts import cases
from clip_gen.worlds.shapes.rendering import coverage, render
from clip_gen.worlds.shapes.scenes import BACKGROUNDS, COLOURS, Scene, sample_scene

UNSEEN = 1_000_003  # seed of pictures that no training uses


def train(pictures: Path, out: Path, words: list[str]) -> tuple[float, float]:
    """Runs the command `train` from the model of shapes; returns its minutes and its peak memory in GB."""
    began, peak = time.monotonic(), 0
    base = ["--base", str(BUNDLED)]  # the words may name another
    command = [sys.executable, "-m", "clip_gen", "train", str(pictures), "--out", str(out), *base, *words]
    environment = TRAIN_ENVIRONMENT | os.environ | {"PYTHONPATH": str(ROOT), "MKL_CBWR": "AUTO"}
    training = subprocess.Popen(command, env=environment, start_new_session=True)
    while training.poll() is None:
        peak = max(peak, memory(training.pid))
        time.sleep(1)
    if training.returncode:
        raise SystemExit(training.returncode)
    return (time.monotonic() - began) / 60, peak / 1e9


def memory(session: int) -> int:
    """Bytes of all processes of a session; shared pages count once (PSS)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            if os.getsid(int(process.name)) == session:
                line = next(line for line in (process / "smaps_rollup").open() if line.startswith("Pss:"))
                total += int(line.split()[1]) * 1024
    return total


def scratch(arguments: argparse.Namespace) -> dict[str, object]:
    archive = arguments.out / "pictures.zip"
    if not archive.exists():
        write_pictures(arguments.pictures, 4, archive, 256, captions=False, zipped=True, held_out="never")
    words = ["--size", "laptop", "--no-crop", "--shift", f"--max-minutes={arguments.minutes}", *arguments.words]
    took, _ = train(archive, arguments.out / "trained", words)
    model = ClipGen.load(arguments.out / "trained" / "model", "cpu")
    psnr, used = reconstructed(model, 1000)
    evaluation = Evaluation(WORLD, model, arguments.prompts, 0, Sampling())
    evaluation.run(["one"])
    print(evaluation.table())
    evaluation.sheet().save(arguments.out / "sheet.png")
    shares = {name: share.value for name, share in evaluation.rows.items()}
    return {"minutes": took, "psnr": psnr, "codes_used": used, **shares}


@torch.inference_mode()
def reconstructed(model: ClipGen, count: int) -> tuple[float, float]:
    """Mean PSNR in dB of unseen pictures, and the share of codes that they use."""
    pictures = RenderedPictures(count, UNSEEN, model.config.vqgan.resolution)
    found, used = [], set()
    for start in range(0, count, 50):
        images = from_bytes(torch.stack([torch.from_numpy(pictures[i]) for i in range(start, start + 50)]))
        tokens = model.vqgan.encode(images)
        found += decibels(squared_errors(model.vqgan.decode(tokens), images)).tolist()
        used |= set(tokens.unique().tolist())
    return float(np.mean(found)), len(used) / model.config.vqgan.codebook_size


def style(arguments: argparse.Namespace) -> dict[str, object]:
    archive = arguments.out / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for i, scene in enumerate(scenes(arguments.pictures)):
            with file.open(f"{i:05d}.png", "w") as entry:
                Image.fromarray(outlined_picture(scene)).save(entry, "png")
    before = drawn(ClipGen.load(BUNDLED, "cpu"), arguments.prompts)
    words = [f"--max-minutes={arguments.minutes}", *arguments.words]
    took, _ = train(archive, arguments.out / "trained", words)
    after = drawn(ClipGen.load(arguments.out / "trained" / "model", "cpu"), arguments.prompts)
    shown, side = 16, 64
    sheet = Image.new("RGB", (shown * side, 2 * side))
    for row, pictures in enumerate((before, after)):
        for i, picture in enumerate(pictures[:shown]):
            sheet.paste(picture, (i * side, row * side))
    sheet.save(arguments.out / "sheet.png")
    true = [Image.fromarray(outlined_picture(scene)) for scene in scenes(100)]
    return {"minutes": took, "before": outlines(before), "after": outlines(after), "of_pictures": outlines(true)}


def outlines(pictures: list[Image.Image]) -> dict[str, float]:
    shares = np.array([outline_share(picture) for picture in pictures])
    return {"outline": float(shares.mean()), "outlined": float((shares >= 0.2).mean())}


def peaks(arguments: argparse.Namespace) -> dict[str, object]:
    words = ["--vqgan-steps", "20", "--transformer-steps", "20", "--no-crop", "--no-flip", *arguments.words]
    found = {}
    for count in (200, arguments.pictures):
        archive = arguments.out / f"{count}.zip"
        if not archive.exists():
            write_pictures(count, 4, archive, 256, captions=False, zipped=True, held_out="never")
        _, found[str(count)] = train(archive, arguments.out / str(count), words)
    return {"gigabytes": found, "more": found[str(arguments.pictures)] - found["200"]}


def scenes(count: int) -> Iterator[Scene]:
    for i in range(count):
        yield sample_scene(np.random.default_rng([UNSEEN, i]))


def outlined_picture(scene: Scene) -> np.ndarray:
    """The scene with a line around each shape: white on dark backgrounds, black on others."""
    picture = render(replace(scene, items=())).astype(np.float32)
    for item in scene.items:
        for share, colour in ((1.0, outline(BACKGROUNDS[scene.background])), (0.7, COLOURS[item.colour])):
            alpha = coverage(item.shape, item.x, item.y, share * item.radius, len(picture))[..., None]
            picture += alpha * (np.float32(colour) - picture)
    return (picture + 0.5).astype(np.uint8)


def outline(background: tuple[float, float, float]) -> np.ndarray:
    return np.float32([0, 0, 0] if np.mean(background) > 100 else [255, 255, 255])


def outline_share(picture: Image.Image) -> float:
    """The share of the foreground in the outline's colour; from 0.2 on a picture counts as outlined."""
    pixels = np.asarray(picture, np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    foreground = ((pixels - background) ** 2).sum(axis=-1) > MIN_FOREGROUND**2
    line = ((pixels - outline(tuple(background))) ** 2).sum(axis=-1) < MIN_FOREGROUND**2
    return float((line & foreground).sum() / max(1, foreground.sum()))


def drawn(model: ClipGen, count: int) -> list[Image.Image]:
    """The best of 16 for one-object prompts."""
    prompts = [case.prompt for case in cases("one", count, 0)]
    return [model.generate(prompt, num_outputs=1, seed=i).images[0] for i, prompt in enumerate(prompts)]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks own-pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["scratch", "style", "memory"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--prompts", type=int, default=100)
    arguments, arguments.words = parser.parse_known_args(words)
    pictures, minutes = {"scratch": (2000, 44.0), "style": (300, 10.0), "memory": (20_000, 0.0)}[arguments.what]
    arguments.pictures, arguments.minutes = arguments.pictures or pictures, arguments.minutes or minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"scratch": scratch, "style": style, "memory": peaks}[arguments.what](arguments)
    (arguments.out / "result.json").write_text(json.dumps(result | {"words": arguments.words}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
