"""taming's LPIPS, frozen. The metric is described in arXiv 1801.03924."""

from __future__ import annotations

import warnings

from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SyntaxWarning of taming's source
    from taming.modules.losses.lpips import LPIPS, NetLinLayer, ScalingLayer, vgg16


class FrozenLPIPS(LPIPS):
    """Randomly initialised, frozen, always in eval mode. Its state dict has the convolutions and the linear layers.

    Takes two batches of images (B, 3, S, S) in [-1, 1], gives their distances (B, 1, 1, 1). RuntimeError for S below
    16: a VGG-16 halves the resolution four times.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not LPIPS.__init__, which downloads weights
        self.chns = [64, 128, 256, 512, 512]
        self.scaling_layer = ScalingLayer()
        for name, buffer in list(self.scaling_layer.named_buffers()):  # constants, not weights
            self.scaling_layer.register_buffer(name, buffer, persistent=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, of the argument that taming passes to it
            self.net = vgg16(pretrained=False)
        for i, channels in enumerate(self.chns):
            self.add_module(f"lin{i}", NetLinLayer(channels, use_dropout=True))
        self.train(False).requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        """Ignores `mode`: dropout would make the loss random."""
        return super().train(False)
