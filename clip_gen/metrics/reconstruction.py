"""How close pictures come to their originals: PSNR, SSIM and LPIPS."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from clip_gen.networks.lpips import FrozenLPIPS


def squared_errors(images: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error of each of `images` (B, 3, S, S) in [-1, 1], (B,)."""
    return (images.float() - targets).square().mean(dim=(1, 2, 3))


def decibels(errors: Tensor) -> Tensor:
    """The PSNR in dB of mean squared errors, for the range [-1, 1]; at most 106 dB."""
    return 10 * torch.log10(4 / errors.clamp(min=1e-10))


def similarities(images: Tensor, originals: Tensor, lpips: FrozenLPIPS | None = None) -> dict[str, Tensor]:
    """PSNR in dB, SSIM (IEEE Trans. Image Process. 13, 2004), and LPIPS if it is given, of each of `images`
    (B, 3, S, S) in [-1, 1], (B,).
    """
    images = images.clamp(-1, 1)
    ssim = structural_similarity_index_measure(images, originals, data_range=2.0, reduction="none")
    found = {"PSNR": decibels(squared_errors(images, originals)), "SSIM": ssim.reshape(-1)}
    return found if lpips is None else found | {"LPIPS": lpips(images, originals).flatten()}
