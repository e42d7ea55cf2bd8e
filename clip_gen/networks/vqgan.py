"""Images <-> tokens. The only door to taming-transformers and to the quantiser library.

VQGAN: "Taming Transformers for High-Resolution Image Synthesis", arXiv 2012.09841. Low-dimensional l2-normalised
codes: "Vector-quantized Image Modeling with Improved VQGAN", arXiv 2110.04627.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import NamedTuple

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import logger as quantizer_log
from vector_quantize_pytorch.vector_quantize_pytorch import sample_vectors_distributed

from clip_gen.config import VQGANConfig


class Reconstruction(NamedTuple):
    images: Tensor  # (B, 3, S, S), not clamped, so that a loss sees how far outside they are
    tokens: Tensor  # (B, T)
    loss: Tensor  # scalar: codebook and commitment


class TamingQuantizer(nn.Module):
    """taming's VectorQuantizer2 with the two loss terms the right way round (legacy=False)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.quantize = VectorQuantizer2(config.codebook_size, config.codebook_dim, beta=0.25, legacy=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, loss, (_, _, tokens) = self.quantize(features)
        return codes, tokens.view(features.shape[0], -1), loss

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.quantize.embedding(tokens)

    def share_between_processes(self) -> None:
        """The codebook is a parameter, which every process has the same of anyway."""


class CosineQuantizer(nn.Module):
    """Codes on the unit sphere, moved by a running mean of what they stand for; unused ones start again."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        # It warns when the first batch has fewer vectors than there are codes. The rest start again, as unused ones do.
        quantizer_log.disable("vector_quantize_pytorch")
        self.quantize = VectorQuantize(
            dim=config.codebook_dim,
            codebook_size=config.codebook_size,
            use_cosine_sim=True,
            kmeans_init=True,
            threshold_ema_dead_code=0.25,
            decay=0.98,
            commitment_weight=0.25,
            rotation_trick=False,
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, h, w = features.shape
        rows = features.flatten(2).transpose(1, 2)  # (B, T, C)
        codes, tokens, loss = self.quantize(rows)
        return codes.transpose(1, 2).reshape(batch, channels, h, w), tokens, loss.sum()

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.quantize.get_codes_from_indices(tokens)

    def share_between_processes(self) -> None:
        """One codebook for all processes of a training, which the library sets up only where they ran already."""
        codebook = self.quantize._codebook
        codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = distributed.all_reduce
        codebook.sample_fn = codebook.replace_sample_fn = sample_vectors_distributed


class GumbelQuantizer(nn.Module):
    """taming's GumbelQuantize: the encoder names a code by logits. Drawn in training, else always the likeliest."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.quantize = GumbelQuantize(config.codebook_dim, config.codebook_dim, config.codebook_size, kl_weight=1e-8)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            codes, loss, (_, _, tokens) = self.quantize(features)
            return codes, tokens.flatten(1), loss
        tokens = self.quantize.proj(features).argmax(dim=1)  # (B, h, w)
        return self.lookup(tokens).permute(0, 3, 1, 2), tokens.flatten(1), features.new_zeros(())

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.quantize.embed(tokens)


QUANTIZERS = {"taming": TamingQuantizer, "cosine": CosineQuantizer, "gumbel": GumbelQuantizer}


class VQGAN(nn.Module):
    def __init__(self, config: VQGANConfig):
        super().__init__()
        if config.quantizer not in QUANTIZERS:
            names = ", ".join(QUANTIZERS)
            raise ValueError(f'vqgan.quantizer is "{config.quantizer}"; it takes one of {names}')
        self.config = config
        channels = 3 * config.patch**2
        sizes = {
            "ch": config.ch,
            "out_ch": channels,
            "ch_mult": tuple(config.ch_mult),
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": config.attn_resolutions,
            "dropout": config.dropout,
            "in_channels": channels,
            "resolution": config.resolution // config.patch,
            "z_channels": config.z_channels,
        }
        with redirect_stdout(None):  # the decoder announces its shapes
            self.encoder = Encoder(double_z=False, **sizes)
            self.decoder = Decoder(**sizes)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = config.norm_eps
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.quantizer = QUANTIZERS[config.quantizer](config)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the quantiser sees: (B, codebook_dim, h, w), and None.

        With `local` it is (U, codebook_dim, 1, 1) for the U different squares, and which of them each token is, (B, T).
        A square that comes again goes through once: quicker where pictures have plain parts, and the codebook is spread
        over what there is to tell apart instead of what there is most of.
        """
        squares, which = F.pixel_unshuffle(images, self.config.patch), None
        if self.config.local:
            rows = squares.flatten(2).transpose(1, 2)  # (B, T, pixels)
            different, which = rows.flatten(0, 1).unique(dim=0, return_inverse=True)
            squares, which = different[:, :, None, None], which.view(rows.shape[:2])
        return self.quant_conv(self.encoder(squares)), which

    def pixels(self, codes: Tensor) -> Tensor:
        """Codes (B, codebook_dim, h, w) to images, not clamped."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(codes)), self.config.patch)

    def forward(self, images: Tensor) -> Reconstruction:
        """Through the codebook and back, with gradients: straight-through to the encoder."""
        codes, tokens, loss = self._quantized(images)
        return Reconstruction(self.pixels(codes), tokens, loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, T) int64, row by row, of images (B, 3, S, S) in [-1, 1]."""
        return self._quantized(images)[1]

    def _quantized(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (B, codebook_dim, h, w), tokens (B, T), loss (scalar)."""
        features, which = self.features(images)
        # Which code is nearest is a matter of small differences: not for bfloat16.
        with torch.autocast(images.device.type, enabled=False):
            codes, tokens, loss = self.quantizer(features.float())
        if which is not None:
            codes, tokens = self._on_grid(codes.flatten(1)[which]), tokens.flatten()[which]
        return codes, tokens, loss

    def _on_grid(self, codes: Tensor) -> Tensor:
        """(B, T, C) to (B, C, h, w)."""
        # Contiguous, as taming hands them on: in another memory order convolutions round differently.
        return codes.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid)).contiguous()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of tokens (B, T)."""
        return self.pixels(self._on_grid(self.quantizer.lookup(tokens))).clamp(-1, 1)

    def decode_mixture(self, shares: Tensor) -> Tensor:
        """Images (B, 3, S, S), not clamped, of shares (B, T, V) of the codes at each place; gradients flow to them."""
        every = self.quantizer.lookup(torch.arange(self.config.codebook_size, device=shares.device)[None])[0]
        return self.pixels(self._on_grid(shares @ every))


def build_discriminator(channels: int = 64, layers: int = 3) -> nn.Module:
    """taming's discriminator of patches with its own start; `channels` in its first layer."""
    return NLayerDiscriminator(ndf=channels, n_layers=layers).apply(weights_init)


def discriminator_layers(names: Iterable[str]) -> int:
    """How many layers one has, by the names of its tensors."""
    return sum(name.endswith(".running_mean") for name in names)


def build_lpips() -> nn.Module:
    """taming's LPIPS with a random start, frozen, in eval mode for good; its state is convolutions and linear layers.

    Called with two batches of images (B, 3, S, S) in [-1, 1], it gives their distances, (B, 1, 1, 1). RuntimeError
    where S is below 16: a VGG-16 halves four times.
    """
    with warnings.catch_warnings():
        # Python warns of its source the first time, torchvision of the way it asks for a VGG.
        warnings.simplefilter("ignore")
        # Not above: it brings an HTTP client, which predicting has no use for.
        from taming.modules.losses.lpips import LPIPS, NetLinLayer, ScalingLayer, vgg16

        class Frozen(LPIPS):
            """With the parts that LPIPS.forward asks for, but nothing of LPIPS.__init__, which downloads."""

            def __init__(self):
                nn.Module.__init__(self)
                self.chns = [64, 128, 256, 512, 512]
                self.scaling_layer, self.net = ScalingLayer(), vgg16(pretrained=False)
                for name, buffer in list(self.scaling_layer.named_buffers()):  # constants, not weights
                    self.scaling_layer.register_buffer(name, buffer, persistent=False)
                for i, channels in enumerate(self.chns):
                    self.add_module(f"lin{i}", NetLinLayer(channels, use_dropout=True))

            def train(self, mode: bool = True) -> nn.Module:
                """Stays in eval mode whatever a parent asks: it must never drop out."""
                return super().train(False)

        return Frozen().train(False).requires_grad_(False)
