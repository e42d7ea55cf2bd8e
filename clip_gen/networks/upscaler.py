"""Real-ESRGAN (Wang et al., 2021): pictures enlarged by a network."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_gen.networks.skip_init import SkipInit


class Upscaler:
    """A network that enlarges images by `scale`, built from its tensors. ValueError for tensors of something else."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device):
        # Imported here: it takes 0.3 seconds, and few requests enlarge pictures.
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

        try:
            with SkipInit():
                network = ModelLoader(device).load_from_state_dict(dict(tensors))
        except UnsupportedModelError as error:
            raise ValueError(f"tensors such as {min(tensors)} are of no upscaler that is known") from error
        if not isinstance(network, ImageModelDescriptor) or network.input_channels != 3 or network.scale < 2:
            raise ValueError(f"this {network.architecture.name} enlarges no RGB pictures")
        self.network, self.scale, self.device = network.eval(), network.scale, device

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """One image (1, 3, H, W) in [-1, 1], enlarged to (1, 3, scale H, scale W) on the network's device."""
        return self.network((image.to(self.device) + 1) / 2) * 2 - 1
