"""Masks: which part of a picture is redrawn, which tokens that are, and how the new part is put into the picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_gen.config import VQGANConfig
from clip_gen.images import resized_square, to_tensor
from clip_gen.sampling.condition import open_picture

SEAM = 64  # the seam's width is the picture's side divided by this: 1 pixel of 64, 4 of 256
LEAST_WHITE = 128  # levels of 255 from which a mask's pixel is white
MAX_ASPECT_ERROR = 0.02  # between the aspect ratios of picture and mask; rounding may make them differ


@dataclass(frozen=True, eq=False)
class Inpainting:
    """A picture, part of which is redrawn. note: how it was resized and cropped, for the log."""

    picture: Tensor  # (3, S, S) in [-1, 1]
    mask: Tensor  # (S, S) bool, True where it is redrawn
    note: str

    def redrawn_tokens(self, config: VQGANConfig) -> Tensor:
        """Which of the picture's tokens are sampled, (T,) bool: those with a masked pixel in their square.

        Unless the encoder is local, also the tokens next to them: they have seen what the mask removes.
        """
        squares = F.max_pool2d(self.mask[None].float(), config.resolution // config.grid)  # (1, h, w)
        if not config.local:
            squares = _grown(squares)
        return squares.flatten() > 0

    @cached_property
    def opacity(self) -> Tensor:
        """Of what is drawn, (1, S, S): 0 outside the mask, rising inside it over the width of the seam to 1."""
        kept = [(~self.mask)[None].float()]
        for _ in range(max(1, len(self.mask) // SEAM)):
            kept.append(_grown(kept[-1]))
        return 1 - torch.stack(kept).mean(dim=0)

    def paste(self, image: Tensor) -> Tensor:
        """The picture with the masked part of an image of the same size, (3, S, S)."""
        return torch.lerp(self.picture, image, self.opacity)


def _grown(areas: Tensor) -> Tensor:
    """Areas (1, h, w) of ones, larger by one on all sides."""
    return F.max_pool2d(areas, 3, stride=1, padding=1)


def read_inpainting(
    init_image: str | Path | Image.Image, mask: str | Path | Image.Image, resolution: int, device: torch.device
) -> Inpainting:
    """The central squares of a picture and its mask at the model's own size, as in training.

    ValueError for files that cannot be used, for a mask of another shape and for one without any white.
    """
    picture, painted = open_picture(init_image, "init_image"), open_picture(mask, "mask")
    if abs(painted.width * picture.height / (painted.height * picture.width) - 1) > MAX_ASPECT_ERROR:
        raise ValueError(
            f"mask is {painted.width} x {painted.height} pixels, but init_image is {picture.width} x {picture.height}; "
            "give a mask of the same shape"
        )
    side, size = min(picture.size), f"{resolution} x {resolution}"
    redrawn = np.asarray(resized_square(painted, resolution).convert("L")) >= LEAST_WHITE
    if not redrawn.any():
        raise ValueError(f"mask has no white in its central square at {size} pixels; paint white what to redraw")
    note = f"init_image is {picture.width} x {picture.height} pixels: its central {side} x {side} become {size}"
    pixels = to_tensor([resized_square(picture, resolution)])[0]
    return Inpainting(pixels.to(device), torch.from_numpy(redrawn).to(device), note)
