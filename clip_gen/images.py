"""Converts PIL images to tensors and back, and saves them with metadata.

Images are (B, 3, S, S) float32 in [-1, 1], except for CLIP, which has its own normalisation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from clip_gen.files import atomic_file
from clip_gen.validation import check_number

OUTPUT_FORMATS = ("png", "webp", "jpg")

# Mean and standard deviation of CLIP's inputs (OpenAI's clip/clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SHEET_GAP = 4  # pixels between the pictures of a contact sheet and around them
REDUCING_GAP = 3.0  # a picture is first reduced to this multiple of its final size, which is fast; the rest is bicubic
EXIF_IMAGE_DESCRIPTION = 0x010E
FULL_COLOUR_QUALITY = 90  # lowest quality of JPEGs whose colours are saved at full resolution


def resized_square(
    picture: Image.Image, resolution: int, share: float = 1.0, x: float = 0.5, y: float = 0.5
) -> Image.Image:
    """A square with this share of the shorter side, resized to S x S; x and y in [0, 1] say where."""
    side = max(1, round(min(picture.size) * share))
    left, top = round((picture.width - side) * x), round((picture.height - side) * y)
    box = (left, top, left + side, top + side)
    # Not Lanczos, which overshoots at hard edges. Reducing first is several times faster on photographs.
    return picture.resize((resolution, resolution), Image.Resampling.BICUBIC, box, REDUCING_GAP)


def letterboxed(picture: Image.Image, resolution: int) -> Image.Image:
    """The whole picture in the middle of a square of S x S; the bars have the median colour of its edges."""
    scale = resolution / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
    pixels = np.asarray(small)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    square = Image.new("RGB", (resolution, resolution), tuple(np.median(edges, axis=0).astype(int).tolist()))
    square.paste(small, ((resolution - width) // 2, (resolution - height) // 2))
    return square


def to_tensor(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Equal-sized RGB pictures, uint8, to (B, 3, H, W) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(picture, np.uint8) for picture in pictures])
    return from_bytes(torch.from_numpy(pixels))


def from_bytes(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8; values outside are clamped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to RGB pictures; values outside are clamped."""
    return [Image.fromarray(picture) for picture in to_bytes(images).cpu().numpy()]


def for_clip(images: Tensor, resolution: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to normalised inputs of CLIP, (B, 3, resolution, resolution).

    Resizes the shorter side and crops the middle, as OpenAI's preprocessing does.
    """
    height, width = images.shape[-2:]
    images = images.float()  # torch cannot resize bfloat16 on a CPU
    if (height, width) != (resolution, resolution):
        short = min(height, width)
        size = (resolution * height // short, resolution * width // short)
        # One side after the other with a clamp in between, as PIL does.
        for sides in ((height, size[1]), size):
            images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = (round((side - resolution) / 2) for side in size)
        images = images[..., top : top + resolution, left : left + resolution]
    unit = (images.clamp(-1, 1) + 1) / 2
    mean = unit.new_tensor(CLIP_MEAN).view(1, 3, 1, 1)
    std = unit.new_tensor(CLIP_STD).view(1, 3, 1, 1)
    return (unit - mean) / std


def contact_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size on a white sheet, in rows, as many rows as columns or one less."""
    width, height = (side + SHEET_GAP for side in pictures[0].size)
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width + SHEET_GAP, rows * height + SHEET_GAP), (255, 255, 255))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width + SHEET_GAP, i // columns * height + SHEET_GAP))
    return sheet


def read_metadata(path: Path) -> dict[str, str]:
    """What `save_image` wrote into a file, as texts; empty for other pictures. ValueError for what is no picture."""
    try:
        with Image.open(path, formats=("png", "webp", "jpeg")) as picture:
            if isinstance(picture, PngImagePlugin.PngImageFile):
                return {name: str(value) for name, value in picture.text.items()}
            description = picture.getexif().get(EXIF_IMAGE_DESCRIPTION)
    except OSError as error:  # PIL raises one for everything that it cannot read
        reason = error.strerror or "no PNG, WebP or JPEG file"
        raise ValueError(f"{path}: cannot be read ({reason}); give a picture that this program drew") from error
    try:
        found = json.loads(str(description))
    except ValueError:
        found = None
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def save_image(
    image: Image.Image,
    path: Path,
    output_format: str = "png",
    quality: int = 90,
    metadata: dict[str, object] | None = None,
) -> None:
    """Writes a picture atomically.

    Metadata becomes PNG text under its names, or JSON in the EXIF description of WebP and JPEG. quality: 0 to 100, not
    for PNG; WebP is lossless at 100.
    """
    if output_format not in OUTPUT_FORMATS:
        raise ValueError(f'output_format is "{output_format}"; it takes one of {", ".join(OUTPUT_FORMATS)}')
    check_number("output_quality", quality, 0, 100, whole=True)
    # Each format uses those that it knows.
    options: dict[str, object] = {"quality": quality, "lossless": quality == 100}
    if quality >= FULL_COLOUR_QUALITY:
        options["subsampling"] = "4:4:4"
    if output_format == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, value in (metadata or {}).items():
            options["pnginfo"].add_itxt(name, str(value))
    elif metadata:
        exif = Image.Exif()
        exif[EXIF_IMAGE_DESCRIPTION] = json.dumps(metadata)
        options["exif"] = exif
    with atomic_file(path, durable=False) as temporary:
        image.save(temporary, "jpeg" if output_format == "jpg" else output_format, **options)
