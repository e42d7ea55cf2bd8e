"""The drawings of things by three artists, and the same drawings in other colours.

`drawings.zip` has one WebP of 128 x 128 pixels with transparency for every thing and style. It is in the repository, so
that training downloads nothing. LICENSES.md names artists and licences.
"""

from __future__ import annotations

import io
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ARCHIVE = Path(__file__).parent / "drawings.zip"
STYLES = ("noto", "flat", "3d")  # Google's Noto Emoji, Twitter's Twemoji, Microsoft's Fluent Emoji

# RGB, 0 to 255.
COLOURS = {
    "red": (222, 40, 48),
    "orange": (245, 130, 20),
    "yellow": (250, 210, 40),
    "green": (40, 160, 70),
    "blue": (40, 105, 225),
    "purple": (140, 60, 200),
    "pink": (250, 130, 180),
    "brown": (130, 80, 45),
}

# A drawing has a dominant hue if many of its pixels are coloured, and most of these have nearly the same hue.
MIN_CHROMA = 0.05  # in OKLab; pixels below are gray
HUE_WIDTH = np.pi / 5  # greatest distance from the dominant hue
MIN_COLOURED = 0.35  # share of the opaque pixels
MIN_DOMINANT = 0.75  # share of the coloured pixels
HUE_BINS = 36

# sRGB to OKLab: bottosson.github.io/posts/oklab.
_TO_LMS = np.float32(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.float32(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in [0, 1] to OKLab."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """OKLab (..., 3) to sRGB, clipped to [0, 1]."""
    linear = ((lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T).clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@cache
def _archive() -> dict[str, bytes]:
    with zipfile.ZipFile(ARCHIVE) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def drawing(name: str, style: str) -> np.ndarray:
    """The drawing of a thing, (128, 128, 4) uint8 RGBA."""
    return np.asarray(Image.open(io.BytesIO(_archive()[f"{style}/{name}.webp"])).convert("RGBA"))


@cache
def dominant_hue(name: str, style: str) -> float | None:
    """The hue of most of a drawing in OKLab, in radians; None if it has none, and cannot be recoloured."""
    pixels = drawing(name, style)
    lab = to_oklab(pixels[pixels[..., 3] > 128][:, :3] / np.float32(255))
    coloured = lab[np.hypot(lab[:, 1], lab[:, 2]) > MIN_CHROMA]
    if len(coloured) < MIN_COLOURED * len(lab):
        return None
    hues = np.arctan2(coloured[:, 2], coloured[:, 1])
    counts, edges = np.histogram(hues, HUE_BINS, range=(-np.pi, np.pi))
    hue = edges[(counts + np.roll(counts, 1) + np.roll(counts, -1)).argmax()] + np.pi / HUE_BINS
    return float(hue) if (_turn(hues, hue) < HUE_WIDTH).mean() >= MIN_DOMINANT else None


def recoloured(name: str, style: str, colour: str) -> np.ndarray:
    """The drawing with its dominant hue in another colour. The shading stays."""
    pixels, hue = drawing(name, style), dominant_hue(name, style)
    assert hue is not None, f"{name} in {style} has no dominant hue"
    lab = to_oklab(pixels[..., :3] / np.float32(255))
    chroma, turn = np.hypot(lab[..., 1], lab[..., 2]), _turn(np.arctan2(lab[..., 2], lab[..., 1]), hue)
    changed = (turn < 1.3 * HUE_WIDTH) & (chroma > MIN_CHROMA / 2)
    typical = changed & (pixels[..., 3] > 128) & (chroma > MIN_CHROMA)
    target, scale = to_oklab(np.float32(COLOURS[colour]) / 255), chroma / np.median(chroma[typical])
    lightness = lab[..., 0] + target[0] - np.median(lab[typical][:, 0])
    moved = np.stack([lightness, target[1] * scale, target[2] * scale], axis=-1)
    rgb = from_oklab(np.where(changed[..., None], moved, lab).clip([0, -1, -1], [1, 1, 1]))
    return np.concatenate([(255 * rgb + 0.5).astype(np.uint8), pixels[..., 3:]], axis=-1)


def _turn(hues: np.ndarray, hue: float) -> np.ndarray:
    """The distances of hues from one hue, in radians."""
    return np.abs((hues - hue + np.pi) % (2 * np.pi) - np.pi)
