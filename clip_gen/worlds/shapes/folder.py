"""The command `shapes`: writes pictures of the shapes world to a folder, with or without captions, or to a zip."""

from __future__ import annotations

import argparse
import io
import json
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from math import inf
from pathlib import Path

import numpy as np
from PIL import Image

from clip_gen.files import atomic_file, check_writable
from clip_gen.validation import check_number
from clip_gen.worlds.shapes.captions import caption, describe
from clip_gen.worlds.shapes.rendering import render
from clip_gen.worlds.shapes.scenes import Scene, sample_scene

log = logging.getLogger(__name__)

MIN_RESOLUTION, MAX_RESOLUTION = 16, 4096  # a small star needs 16 pixels


def write_pictures(
    count: int, seed: int, out: Path, resolution: int, captions: bool, zipped: bool, held_out: str
) -> Path:
    """Writes pictures; returns the folder or zip. The first n pictures of a seed are the same for every count.

    captions: also write captions.jsonl with a line per picture. zipped: write one zip instead of a folder.
    held_out: as in sample_scene. ValueError if the folder has files or the zip exists.
    """
    check_number("count", count, 1, inf, whole=True)
    check_number("seed", seed, 0, inf, whole=True)
    check_number("resolution", resolution, MIN_RESOLUTION, MAX_RESOLUTION, whole=True)
    if captions and zipped:
        raise ValueError("a zip has no captions; leave out --captions or --zip")
    pictures = _pictures(count, seed, resolution, held_out)
    if zipped:
        out = out if out.suffix.lower() == ".zip" else out.with_name(f"{out.name}.zip")
        _write_zip(pictures, out)
    else:
        _write_folder(pictures, out, captions)
    log.info("%s: %d pictures of %d px, seed %d", out, count, resolution, seed)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m clip_gen shapes`."""
    parser.add_argument("--count", type=int, required=True, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0, help="default 0; picture i depends only on the seed and i")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder, or the zip to write")
    parser.add_argument("--captions", action="store_true", help="also write captions.jsonl")
    parser.add_argument("--zip", action="store_true", help="write one zip instead of a folder")
    parser.add_argument("--resolution", type=int, default=64, help="side in pixels; default 64")
    parser.add_argument(
        "--held-out",
        choices=("never", "may", "only"),
        default="never",
        help="the five colour-shape pairs kept from training: leave them out (default), allow them, or draw only them",
    )


def main(arguments: argparse.Namespace) -> None:
    write_pictures(
        arguments.count,
        arguments.seed,
        arguments.out,
        arguments.resolution,
        arguments.captions,
        zipped=arguments.zip,
        held_out=arguments.held_out,
    )


def _pictures(count: int, seed: int, resolution: int, held_out: str) -> Iterator[tuple[str, bytes, Scene]]:
    """Each picture's file name, its PNG, and its scene."""
    for i in range(count):
        scene, buffer = sample_scene(np.random.default_rng([seed, i]), held_out=held_out), io.BytesIO()
        Image.fromarray(render(scene, resolution)).save(buffer, "png")
        yield f"{i:05d}.png", buffer.getvalue(), scene


def _write_folder(pictures: Iterator[tuple[str, bytes, Scene]], out: Path, captions: bool) -> None:
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"{out} has files in it already; name a new or empty folder")
    lines = []
    for name, png, scene in pictures:
        (out / name).write_bytes(png)
        lines.append(json.dumps({"file": name, "caption": caption(describe(scene)), **asdict(scene)}) + "\n")
    if captions:
        (out / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_zip(pictures: Iterator[tuple[str, bytes, Scene]], out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists already; name another file, or move that one")
    check_writable(out.absolute().parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, png, _ in pictures:
            # A new ZipInfo has a constant time, so a seed always gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name), png)
