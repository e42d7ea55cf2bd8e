"""What stage 1 asks of a reconstruction besides its pixels: that it looks alike, and that it looks real.

"Taming Transformers for High-Resolution Image Synthesis", arXiv 2012.09841; LPIPS, arXiv 1801.03924,
and after it a distance between CLIP's features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.networks.clip_encoder import ClipEncoder

# Of the mean colour's error: a standard deviation of 2.5 levels of 255, more than JPEG leaves in a plain picture.
FLAT = 4e-4


def squared_errors(images: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error of each of `images` (B, 3, S, S) in [-1, 1], (B,)."""
    return (images.float() - targets).square().mean(dim=(1, 2, 3))


def colour_errors(images: Tensor) -> Tensor:
    """The mean squared error of each picture's mean colour, (B,): below FLAT for pictures of one colour."""
    return squared_errors(images.mean(dim=(2, 3), keepdim=True).expand_as(images), images)


def mean_errors(errors: Tensor) -> Tensor:
    """The means (2,) of reconstructions' squared errors and of colour_errors, as the rows of (2, N), N at least 1.

    Pictures of one colour are left out, unless there are no others: the easiest to reconstruct say least.
    """
    varied = errors[1] >= FLAT
    return errors[:, varied | ~varied.any()].mean(dim=1)


def decibels(errors: Tensor) -> Tensor:
    """PSNR of mean squared errors, against the full range of 2; 106 dB at most.

    For several pictures, average their errors first: a mean of decibels says little about most of them when a picture
    of one colour is among them, which is reconstructed at about 100 dB.
    """
    return 10 * torch.log10(4 / errors.clamp(min=1e-10))


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """How near each of `images` (B, 3, S, S) is to its target, in decibels against the full range of 2, (B,)."""
    return decibels(squared_errors(images, targets))


def perceptual_distance(clip: ClipEncoder, images: Tensor, targets: Tensor) -> Tensor:
    """How far apart two batches (B, 3, S, S) look to a frozen CLIP, scalar; gradients flow to `images`.

    The mean over its layers of the squared distance between features brought to unit length at every place, as LPIPS
    does with a VGG, without its learnt weights.
    """
    with torch.no_grad():
        wanted = clip.feature_maps(targets)
    found = clip.feature_maps(images)
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean()
        for a, b in zip(found, wanted, strict=True)
    ]
    return torch.stack(distances).mean()


def lpips_distance(lpips: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The mean LPIPS of two batches (B, 3, S, S) in [-1, 1], S at least 16, scalar; gradients flow to `images`.

    In float32 under autocast too: differences of features that are nearly alike are too small for bfloat16.
    """
    with torch.autocast(images.device.type, enabled=False):
        return lpips(images.float(), targets.float()).mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: logits of real pictures above 1, of reconstructions below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """What makes the adversarial loss pull the decoder's last layer as hard as the reconstruction does; at most 1e4."""
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (pushed,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (pushed.norm() + 1e-4)).clamp(max=1e4).detach()
