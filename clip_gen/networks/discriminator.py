"""taming's patch discriminator, for the adversarial loss of stage 1."""

from __future__ import annotations

from collections.abc import Iterable

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import nn


def build_discriminator(channels: int = 64, layers: int = 3) -> nn.Module:
    """Randomly initialised as in taming; `channels` in its first layer."""
    return NLayerDiscriminator(ndf=channels, n_layers=layers).apply(weights_init)


def discriminator_layers(names: Iterable[str]) -> int:
    """The number of layers of a discriminator whose tensors have these names."""
    return sum(name.endswith(".running_mean") for name in names)
