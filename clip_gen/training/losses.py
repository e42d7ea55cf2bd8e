"""Losses of stage 1, after VQGAN, arXiv 2012.09841, and LPIPS, arXiv 1801.03924; and PSNR."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.metrics.reconstruction import decibels, squared_errors
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.vqgan import VQGAN

# Pictures whose mean colour has a lower squared error count as plain. It is a standard deviation of 2.5 levels of 255,
# more than JPEG artefacts cause.
MAX_PLAIN_ERROR = 4e-4


def reconstruction_errors(vqgan: VQGAN, images: Tensor) -> Tensor:
    """Squared errors (2, B) of the reconstructions of images (B, 3, S, S), and of each image's mean colour."""
    decoded, mean_colour = vqgan.decode(vqgan.encode(images)), images.mean(dim=(2, 3), keepdim=True)
    return torch.stack([squared_errors(decoded, images), squared_errors(mean_colour, images)])


def mean_decibels(errors: Tensor) -> Tensor:
    """The PSNR (2,) in dB of reconstruction_errors (2, N), after averaging: plain pictures, at about 100 dB, would
    dominate a mean of PSNRs. They are left out unless all are plain.
    """
    varied = errors[1] >= MAX_PLAIN_ERROR
    return decibels(errors[:, varied | ~varied.any()].mean(dim=1))


def perceptual_distance(network: FrozenLPIPS | ClipEncoder, images: Tensor, targets: Tensor) -> Tensor:
    """The mean distance of two batches (B, 3, S, S) in [-1, 1], scalar; gradients flow to `images`.

    CLIP's is the mean over its layers of the squared distance between features of unit length at each position, which
    is LPIPS with CLIP instead of VGG and without learnt weights.
    """
    if isinstance(network, FrozenLPIPS):
        # In float32 also under autocast: bfloat16 is too coarse for differences of similar features.
        with torch.autocast(images.device.type, enabled=False):
            return network(images.float(), targets.float()).mean()
    with torch.no_grad():
        target_maps = [F.normalize(features.float(), dim=1) for features in network.feature_maps(targets)]
    image_maps = [F.normalize(features.float(), dim=1) for features in network.feature_maps(images)]
    distances = [(a - b).square().sum(dim=1).mean() for a, b in zip(image_maps, target_maps, strict=True)]
    return torch.stack(distances).mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: zero if logits of real pictures are above 1 and of reconstructions below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(images: Tensor, reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """The factor that gives the adversarial loss the gradient norm of the reconstruction loss at the decoder's last
    layer; at most 1e4.

    images: the decoder's. The two losses are given by their gradients at these, so their networks need not be passed
    backwards again.
    """
    (target,) = torch.autograd.grad(images, last_layer, reconstruction, retain_graph=True)
    (actual,) = torch.autograd.grad(images, last_layer, adversarial, retain_graph=True)
    return (target.norm() / (actual.norm() + 1e-4)).clamp(max=1e4).detach()
