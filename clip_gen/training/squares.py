"""Pictures of any shape to the squares that training sees: crops, mirror images, shifts and letterboxes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

from clip_gen.images import REDUCING_GAP, letterboxed, resized_square

MAX_GROUND_NOISE = 12  # levels of 255 by which a plain background may vary, as after JPEG compression


@dataclass(frozen=True)
class Squares:
    """How a picture becomes (S, S, 3) uint8: `centre` takes the central square, `draw` a random one.

    crop: the smallest crop, as a fraction of the shorter side; 1 for no crops. shift: see `shifted`. letterbox: the
    whole picture with bars instead of a square of it; it is not cropped. scatter: every other draw of a picture with a
    plain background is `scattered` and the others stay whole; only other pictures are cropped.
    """

    resolution: int
    crop: float = 0.8
    flip: bool = True
    shift: bool = False
    letterbox: bool = False
    scatter: bool = False

    @property
    def wanted_side(self) -> int:
        """The side from which on a JPEG may be decoded at a smaller scale, since it would be reduced here."""
        return ceil(REDUCING_GAP * self.resolution / self.crop)

    def centre(self, picture: Image.Image) -> np.ndarray:
        return self._square(picture, share=1.0, x=0.5, y=0.5)

    def draw(self, picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
        # All numbers are drawn with any settings, so changing one setting leaves the other numbers the same.
        share, x, y, mirrored = rng.uniform(self.crop, 1), rng.random(), rng.random(), rng.random() < 0.5
        down, right = rng.random(2)
        pixels = self._square(picture, share, x, y) if self.crop < 1 else self.centre(picture)
        if self.scatter and has_plain_ground(whole := self.centre(picture)):
            pixels = scattered(whole, share, down, right) if rng.random() < 0.5 else whole
        pixels = shifted(pixels, down, right) if self.shift else pixels
        return np.ascontiguousarray(pixels[:, ::-1]) if self.flip and mirrored else pixels

    def _square(self, picture: Image.Image, share: float, x: float, y: float) -> np.ndarray:
        if self.letterbox:
            return np.array(letterboxed(picture, self.resolution))
        return np.array(resized_square(picture, self.resolution, share, x, y))


def shifted(pixels: np.ndarray, down: float, right: float) -> np.ndarray:
    """Moves the content of (S, S, 3) uint8 pixels on their plain background; down and right in [0, 1] say where to.

    The content stays whole and at least as far from the edges as before, or a 32nd of the side. If the background is
    not plain along two opposite edges, nothing moves between them.
    """
    content = (np.abs(pixels - np.median(edges(pixels), axis=0)) > MAX_GROUND_NOISE).any(axis=2)
    moves = []
    for lines, target in ((content.any(axis=1), down), (content.any(axis=0), right)):
        filled = np.flatnonzero(lines)
        before, after = (filled[0], len(lines) - 1 - filled[-1]) if len(filled) else (0, 0)
        margin = min(before, after, max(1, len(lines) // 32))
        moves.append(round((before + after - 2 * margin) * target) - (before - margin) if margin else 0)
    return np.roll(pixels, moves, axis=(0, 1))


def edges(pixels: np.ndarray) -> np.ndarray:
    """The outermost pixels of (S, S, 3), (4 S, 3)."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def has_plain_ground(pixels: np.ndarray) -> bool:
    """Whether the edges of (S, S, 3) uint8 pixels have a single colour, as around a drawing."""
    around = edges(pixels)
    return bool((np.abs(around - np.median(around, axis=0)) <= MAX_GROUND_NOISE).all())


def scattered(pixels: np.ndarray, share: float, down: float, right: float) -> np.ndarray:
    """The picture shrunk to a share of its side, on its plain background; down and right in [0, 1] say where."""
    side = len(pixels)
    small = np.asarray(Image.fromarray(pixels).resize([max(1, round(share * side))] * 2, Image.Resampling.BOX))
    top, left = round((side - len(small)) * down), round((side - len(small)) * right)
    result = np.empty_like(pixels)
    result[:] = np.median(edges(pixels), axis=0)
    result[top : top + len(small), left : left + len(small)] = small
    return result
