"""A small Real-ESRGAN with random numbers, in the published form."""

from __future__ import annotations

import io

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCKS, WIDTH, GROWTH = 2, 8, 32  # published: 23, 64, 32


def upscaler_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"params_ema": upscaler_state()}, file)
    return file.getvalue()


def upscaler_state() -> dict[str, Tensor]:
    sizes = {"conv_first": (3, WIDTH), "conv_last": (WIDTH, 3)}
    sizes |= dict.fromkeys(("conv_body", "conv_up1", "conv_up2", "conv_hr"), (WIDTH, WIDTH))
    for block in range(BLOCKS):
        for dense in (1, 2, 3):
            for conv in range(1, 6):
                after = GROWTH if conv < 5 else WIDTH
                sizes[f"body.{block}.rdb{dense}.conv{conv}"] = (WIDTH + (conv - 1) * GROWTH, after)
    rng, state = torch.Generator().manual_seed(0), {}
    for name, (before, after) in sizes.items():
        state[f"{name}.weight"] = torch.randn(after, before, 3, 3, generator=rng) * (2 / (9 * before)) ** 0.5
        state[f"{name}.bias"] = torch.randn(after, generator=rng) * 0.1
    return state


def reference(state: dict[str, Tensor], image: Tensor) -> Tensor:
    """The network as the papers of ESRGAN and Real-ESRGAN describe it: (1, 3, H, W) in [0, 1] to (1, 3, 4H, 4W)."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def active(name: str, x: Tensor) -> Tensor:
        return F.leaky_relu(conv(name, x), 0.2)

    def dense_block(name: str, x: Tensor) -> Tensor:
        found = x
        for i in range(1, 5):
            found = torch.cat([found, active(f"{name}.conv{i}", found)], dim=1)
        return x + 0.2 * conv(f"{name}.conv5", found)

    x = first = conv("conv_first", image)
    for block in range(BLOCKS):
        before = x
        for dense in (1, 2, 3):
            x = dense_block(f"body.{block}.rdb{dense}", x)
        x = before + 0.2 * x
    x = first + conv("conv_body", x)
    for name in ("conv_up1", "conv_up2"):
        x = active(name, F.interpolate(x, scale_factor=2))
    return conv("conv_last", active("conv_hr", x)).clamp(0, 1)
