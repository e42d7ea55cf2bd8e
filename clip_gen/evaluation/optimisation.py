"""VQGAN+CLIP, the method that CLIP-GEN's paper compares with: gradient ascent on the latent grid of the same VQGAN, so
that random cut-outs of the picture come close to the prompt under the same CLIP (arXiv 2204.08583).

Left out of the published augmentations: sharpness, perspective and a colour jitter of 1 %.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_gen.images import to_pil
from clip_gen.pipeline import ClipGen


@dataclass(frozen=True)
class OptimisationSettings:
    """rate: of Adam. cutouts: of each step. smallest: the least side of a cut-out, as a share of the picture's.
    degrees: the most that it is turned by. flip: mirror half of them. noise: the largest standard deviation.
    """

    rate: float = 0.1
    cutouts: int = 32
    smallest: float = 0.5
    degrees: float = 30.0
    flip: bool = True
    noise: float = 0.1


@dataclass(frozen=True)
class Snapshot:
    """A picture after so many steps and seconds, without the time to load the model."""

    steps: int
    seconds: float
    picture: Image.Image
    score: float  # cosine of its CLIP embedding with the prompt's


def optimise(
    model: ClipGen, prompt: str, steps: Sequence[int], seed: int, settings: OptimisationSettings
) -> list[Snapshot]:
    """Optimises one picture; returns it after each of these numbers of steps.

    Seconds are the process's CPU time on a CPU, so that other programs do not count, and those of the clock on a GPU.
    """
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    generator = torch.Generator(model.device).manual_seed(seed)
    found, spent, began = [], 0.0, clock()
    target = model.embed_prompt(prompt)
    codebook = _codebook(model)
    latent = _random_latent(model, codebook, generator).requires_grad_()
    low, high = codebook.amin(dim=0)[:, None, None], codebook.amax(dim=0)[:, None, None]
    optimizer = torch.optim.Adam([latent], lr=settings.rate)
    for step in range(1, max(steps) + 1):
        images = _decoded(model, latent)
        cut = cutouts(images, model.config.clip.image_resolution, generator, settings)
        loss = spherical_distance(model.clip_encoder.embed_image(cut), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            latent.copy_(latent.clamp(low, high))
        if step in steps:
            with torch.no_grad():
                picture = to_pil(_decoded(model, latent))[0]  # waits for a GPU
            spent += clock() - began
            with torch.no_grad():
                score = (model.clip_encoder.encode_image(_decoded(model, latent)) * target).sum()
            found.append(Snapshot(step, spent, picture, float(score)))
            began = clock()
    return found


def spherical_distance(embeddings: Tensor, target: Tensor) -> Tensor:
    """Twice the squared half angle of unit embeddings (N, E) and (1, E), (N,), as published."""
    return 2 * ((embeddings - target).norm(dim=1) / 2).arcsin().square()


def cutouts(images: Tensor, side: int, generator: torch.Generator, settings: OptimisationSettings) -> Tensor:
    """Random squares (settings.cutouts, 3, side, side) of one image (1, 3, S, S): turned, mirrored, with noise."""
    count, device = settings.cutouts, images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    size = uniform(settings.smallest, 1)
    angle = uniform(-settings.degrees, settings.degrees) * math.pi / 180
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if settings.flip else torch.ones(count, device=device)
    across, down = ((1 - size) * uniform(-1, 1) for _ in range(2))
    rows = [
        size * angle.cos() * mirror,
        -size * angle.sin(),
        across,
        size * angle.sin() * mirror,
        size * angle.cos(),
        down,
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(count, 2, 3), [count, 3, side, side], align_corners=False)
    cut = F.grid_sample(images.expand(count, -1, -1, -1), grid, padding_mode="border", align_corners=False)
    deviations = uniform(0, settings.noise)[:, None, None, None]
    return cut + 2 * deviations * torch.randn(cut.shape, generator=generator, device=device)  # 2: of [-1, 1]


def _codebook(model: ClipGen) -> Tensor:
    """All codes, (V, C)."""
    return model.vqgan.quantizer.lookup(torch.arange(model.config.vqgan.codebook_size, device=model.device)[None])[0]


def _random_latent(model: ClipGen, codebook: Tensor, generator: torch.Generator) -> Tensor:
    """Codes of random tokens, (1, C, h, w)."""
    grid = model.config.vqgan.grid
    tokens = torch.randint(len(codebook), (grid, grid), generator=generator, device=model.device)
    return codebook[tokens].permute(2, 0, 1)[None].contiguous().clone()


def _decoded(model: ClipGen, latent: Tensor) -> Tensor:
    """The image (1, 3, S, S) of the codes nearest to a latent grid (1, C, h, w), to which gradients flow straight."""
    with torch.no_grad():
        codes = model.vqgan.quantizer(latent)[0]
    image = model.vqgan.pixels(latent + (codes - latent).detach())
    return image + (image.clamp(-1, 1) - image).detach()
