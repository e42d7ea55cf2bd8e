"""Makes the encoder of `local` tokens fast: it sees single pixels, of many channels, for which taming's operations are
wasteful.

Parameters, their names and the results stay taming's, up to rounding.
"""

from __future__ import annotations

from taming.modules.diffusionmodules.model import AttnBlock, Encoder
from torch import Tensor, nn
from torch.nn import functional as F


def simplify(encoder: Encoder) -> None:
    """Replaces the operations of an encoder whose inputs have a single pixel, (N, C, 1, 1), in place."""
    for name, module in list(encoder.named_modules()):
        if isinstance(module, AttnBlock):
            encoder.set_submodule(name, SelfAttention(module))
        elif isinstance(module, nn.Conv2d):
            encoder.set_submodule(name, KernelCentre(module))


class KernelCentre(nn.Module):
    """A convolution: only the centre of its kernel meets the pixel, the rest meets padding."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.centre = self.weight.shape[2] // 2

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[:, :, self.centre, self.centre]
        return F.linear(x.flatten(1), weight, self.bias)[:, :, None, None]


class SelfAttention(nn.Module):
    """Attention: a pixel can attend to nothing but itself, so queries and keys do not matter."""

    def __init__(self, block: AttnBlock):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.proj_out = block.norm, block.q, block.k, block.v, block.proj_out

    def forward(self, x: Tensor) -> Tensor:
        # DDP needs a gradient for every parameter, even zero.
        unused = 0.0 * sum(parameter.sum() for part in (self.q, self.k) for parameter in part.parameters())
        return x + self.proj_out(self.v(self.norm(x))) + unused
