"""The two published files that LPIPS is made of, with random numbers in the published shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

# Number among the VGG's features: channels in and out.
CONVOLUTIONS = {
    **{0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)},
    **{17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)},
}


def write_lpips_files(folder: Path) -> Path:
    """In torch's format before 1.6, like the published files."""
    for name, tensors in (("vgg16-397923af.pth", vgg_state()), ("vgg.pth", linear_state())):
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=False)
    return folder


def vgg_state() -> dict[str, Tensor]:
    """Of torchvision's VGG-16; the tensors of its classifier have one number each."""
    rng, state = torch.Generator().manual_seed(0), {}
    for layer, (before, after) in CONVOLUTIONS.items():
        scale = (2 / (9 * before)) ** 0.5
        state[f"features.{layer}.weight"] = torch.randn(after, before, 3, 3, generator=rng) * scale
        state[f"features.{layer}.bias"] = torch.randn(after, generator=rng) * 0.1
    names = [f"classifier.{layer}.{kind}" for layer in (0, 3, 6) for kind in ("weight", "bias")]
    return state | {name: torch.zeros(1) for name in names}


def linear_state() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    sizes = (64, 128, 256, 512, 512)
    return {f"lin{i}.model.1.weight": torch.rand(1, size, 1, 1, generator=rng) for i, size in enumerate(sizes)}
