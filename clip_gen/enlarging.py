"""Pictures at a multiple of the model's own size: `output_size`."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from clip_gen.files import MODULE, sha256_of
from clip_gen.images import to_pil, to_tensor
from clip_gen.networks.upscaler import Upscaler
from clip_gen.sampling.sampler import Stopped
from clip_gen.weights.default_model import upscaler_weights
from clip_gen.weights.importers.upscaler import load_upscaler

log = logging.getLogger(__name__)

OUTPUT_SIZES = ("1x", "2x", "4x")  # multiples of the model's own size
LANCZOS = "lanczos"

_lock = threading.Lock()  # one picture at a time: each takes all cores, or much memory of a GPU


def upscaler_name(output_size: str) -> str | None:
    """What enlarges to this size, for a picture's metadata: the sha256 of the pulled weights, or lanczos."""
    if output_size == "1x":
        return None
    path = upscaler_weights()
    return _sha256(path, path.stat().st_mtime_ns) if path.is_file() else LANCZOS


def enlarger(
    output_size: str, device: torch.device, should_stop: Callable[[], bool] | None = None
) -> Callable[[Image.Image], Image.Image]:
    """A function that enlarges a picture, by the pulled upscaler or else by Lanczos interpolation; the log says which.

    It raises Stopped once should_stop() returns True, and returns the picture itself if output_size is 1x.
    """
    factor, path = int(output_size.removesuffix("x")), upscaler_weights()
    if factor == 1:
        return lambda image: image
    upscaler = None
    if path.is_file():
        with _lock:
            upscaler = _loaded(path, path.stat().st_mtime_ns, device)
        log.info("output_size is %s: Real-ESRGAN enlarges the pictures", output_size)
    else:
        remedy = f"`{MODULE} pull upscaler` downloads Real-ESRGAN, which does it better"
        log.warning("output_size is %s: Lanczos interpolation enlarges the pictures; %s", output_size, remedy)

    def enlarge(image: Image.Image) -> Image.Image:
        with _lock:
            if should_stop and should_stop():
                raise Stopped
            wanted = (image.width * factor, image.height * factor)
            if upscaler:
                (image,) = to_pil(upscaler(to_tensor([image])))
            return image if image.size == wanted else image.resize(wanted, Image.Resampling.LANCZOS)

    return enlarge


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, changed: int, device: torch.device) -> Upscaler:
    return load_upscaler(path, device)


@functools.lru_cache(maxsize=1)
def _sha256(path: Path, changed: int) -> str:
    return sha256_of(path)
