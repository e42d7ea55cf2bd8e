"""VQGAN: images to tokens and back, with taming's encoder and decoder.

"Taming Transformers for High-Resolution Image Synthesis", arXiv 2012.09841.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from typing import NamedTuple

import torch
from taming.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, ResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import VQGANConfig
from clip_gen.networks import local_encoder
from clip_gen.networks.quantizers import QUANTIZERS


class Reconstruction(NamedTuple):
    images: Tensor  # (B, 3, S, S), not clamped: values outside [-1, 1] must count in the loss
    tokens: Tensor  # (B, T)
    loss: Tensor  # scalar: codebook and commitment


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
        with redirect_stdout(None):  # the decoder prints its shapes
            self.encoder = Encoder(double_z=False, **sizes)
            self.decoder = Decoder(**sizes)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = config.norm_eps
        if config.local:
            local_encoder.simplify(self.encoder)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.quantizer = QUANTIZERS[config.quantizer](config)

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks and those with attention, whose activations are most of all."""
        return [module for module in self.modules() if isinstance(module, ResnetBlock | AttnBlock)]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The quantizer's input, (B, codebook_dim, h, w), and None.

        With `local`: (U, codebook_dim, 1, 1) for the U distinct patches of the batch, and the index of every token's
        patch, (B, T). Encoding a repeated patch once is faster for images with plain areas. It also makes frequent
        patches count no more than rare ones in the codebook's updates.
        """
        patches, patch_of_token = F.pixel_unshuffle(images, self.config.patch), None
        if self.config.local:
            rows = patches.flatten(2).transpose(1, 2)  # (B, T, pixels)
            distinct, inverse = rows.flatten(0, 1).unique(dim=0, return_inverse=True)
            patches, patch_of_token = distinct[:, :, None, None], inverse.view(rows.shape[:2])
        return self.quant_conv(self.encoder(patches)), patch_of_token

    def pixels(self, codes: Tensor) -> Tensor:
        """Codes (B, codebook_dim, h, w) to images, not clamped."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(codes)), self.config.patch)

    def forward(self, images: Tensor) -> Reconstruction:
        """Encodes, quantizes and decodes images (B, 3, S, S), with straight-through gradients to the encoder."""
        codes, tokens, loss = self._quantize(images)
        return Reconstruction(self.pixels(codes), tokens, loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, T) int64, in row-major order, of images (B, 3, S, S) in [-1, 1]."""
        return self._quantize(images)[1]

    def _quantize(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (B, codebook_dim, h, w), tokens (B, T), loss (scalar)."""
        features, patch_of_token = self.features(images)
        # bfloat16 is too coarse to compare distances to codes.
        with torch.autocast(images.device.type, enabled=False):
            codes, tokens, loss = self.quantizer(features.float())
        if patch_of_token is not None:
            codes, tokens = self._to_grid(codes.flatten(1)[patch_of_token]), tokens.flatten()[patch_of_token]
        return codes, tokens, loss

    def _to_grid(self, codes: Tensor) -> Tensor:
        """(B, T, C) to (B, C, h, w)."""
        # Contiguous, because convolutions round differently in another memory format.
        return codes.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid)).contiguous()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of tokens (B, T)."""
        return self.pixels(self._to_grid(self.quantizer.lookup(tokens))).clamp(-1, 1)

    def decode_mixture(self, weights: Tensor) -> Tensor:
        """Images (B, 3, S, S), not clamped, of weighted sums of codes: weights (B, T, V), to which gradients flow."""
        codebook = self.quantizer.lookup(torch.arange(self.config.codebook_size, device=weights.device)[None])[0]
        return self.pixels(self._to_grid(weights @ codebook))
