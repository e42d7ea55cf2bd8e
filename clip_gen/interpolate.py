"""The command `python -m clip_gen interpolate`: pictures from one prompt to another, and an animation of them."""

from __future__ import annotations

import argparse
import functools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from clip_gen.files import atomic_file
from clip_gen.generate import DEFAULTS, add_settings, checked_settings, load_model
from clip_gen.images import save_image
from clip_gen.picture_files import check_folder, description, drawing_settings
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.progress_bar import LiveBar
from clip_gen.prompts import mixed_prompt
from clip_gen.validation import check_number

ANIMATION = "animation.webp"
AT_ONCE = 8  # frames drawn together; their candidates share batches
CANDIDATES = 4  # fewer than for a picture, since each is drawn for every frame
SETTINGS = ("negative_prompt", "candidates", "top_k", "top_p", "temperature", "guidance", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("start", help="the prompt of the first frame")
    parser.add_argument("end", help="the prompt of the last frame")
    parser.add_argument("--frames", type=int, default=16, help="2 to 1000; default 16")
    parser.add_argument("--frame-seconds", type=float, default=0.1, help="of the animation, 0.01 to 10; default 0.1")
    add_settings(parser, {name: DEFAULTS[name] for name in SETTINGS} | {"candidates": CANDIDATES})


def main(arguments: argparse.Namespace) -> None:
    check_number("frames", arguments.frames, 2, 1000, whole=True)
    check_number("frame-seconds", arguments.frame_seconds, 0.01, 10)
    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    settings = DEFAULTS | {"candidates": CANDIDATES} | given
    # All candidates in their order: each is drawn with the same random numbers in every frame.
    settings |= {"num_outputs": settings["candidates"], "clip_rerank": False}
    shares = np.linspace(0, 1, arguments.frames).tolist()
    prompts = [mixed_prompt(arguments.start, arguments.end, share) for share in shares]
    frames = [checked_settings(settings | {"prompt": prompt}) for prompt in prompts]
    folder, names = Path(arguments.out), [f"{i:04}.png" for i in range(len(frames))]
    check_folder(folder, [*names, ANIMATION], arguments.overwrite)
    model = load_model(arguments)
    with LiveBar(len(frames)) as bar:
        first = model.generate(**drawing_settings(frames[0]), on_progress=bar.listener())
        results = [first, *draw(model, [frame | {"seed": first.seed} for frame in frames[1:]], bar)]
    best = int(np.sum([result.scores for result in results], axis=0).argmax())
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame, result in zip(names, frames, results, strict=True):
        about = description(model, result, frame) | {"number": best, "score": round(result.scores[best], 4)}
        save_image(result.images[best], folder / name, metadata=about)
    save_animation([result.images[best] for result in results], folder / ANIMATION, arguments.frame_seconds)
    print(f"{folder / ANIMATION}  {len(frames)} frames, {folder / names[0]} to {names[-1]}; seed {first.seed}")


def draw(model: ClipGen, frames: Sequence[dict[str, object]], bar: LiveBar) -> list[Generation]:
    """The results of frames, in their order. An error or Ctrl-C ends all of them within a token."""
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        watched = functools.partial(model.generate, should_stop=stop.is_set)
        drawing = [pool.submit(watched, **drawing_settings(one), on_progress=bar.listener()) for one in frames]
        try:
            return [one.result() for one in drawing]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def save_animation(images: Sequence[Image.Image], path: Path, frame_seconds: float) -> None:
    """A WebP that repeats forever."""
    options = {"save_all": True, "append_images": images[1:], "duration": round(1000 * frame_seconds), "loop": 0}
    with atomic_file(path, durable=False) as temporary:
        images[0].save(temporary, "webp", quality=90, **options)
