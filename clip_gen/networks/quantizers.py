"""Codebooks: features to tokens and codes. All have the same interface, that of `Quantizer`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import Tensor, distributed, nn
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import logger as quantizer_log
from vector_quantize_pytorch.vector_quantize_pytorch import sample_vectors_distributed

from clip_gen.config import VQGANConfig


class Quantizer(nn.Module, ABC):
    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, C, h, w) to codes (B, C, h, w), tokens (B, T) and a scalar loss; straight-through gradients."""

    @abstractmethod
    def lookup(self, tokens: Tensor) -> Tensor:
        """Codes (B, T, C) of tokens (B, T)."""

    @property
    def has_codes(self) -> bool:
        """Whether there are codes yet. Some codebooks are made from their first batch, which changes the weights."""
        return True

    def share_between_processes(self) -> None:
        """Keeps the codebooks of all processes equal. A codebook that is a parameter needs nothing: DDP does it."""


class TamingQuantizer(Quantizer):
    """taming's VectorQuantizer2. legacy=False: beta weights the commitment loss, as in the paper."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.quantize = VectorQuantizer2(config.codebook_size, config.codebook_dim, beta=0.25, legacy=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, loss, (_, _, tokens) = self.quantize(features)
        return codes, tokens.view(features.shape[0], -1), loss

    def lookup(self, tokens: Tensor) -> Tensor:
        return self.quantize.embedding(tokens)


class CosineQuantizer(Quantizer):
    """L2-normalised codes, updated by a moving average of the features assigned to them; unused codes are replaced.

    "Vector-quantized Image Modeling with Improved VQGAN", arXiv 2110.04627.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        # It warns if the first batch has fewer vectors than there are codes. Those codes are replaced later.
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

    @property
    def has_codes(self) -> bool:
        return bool(self.quantize._codebook.initted)

    def share_between_processes(self) -> None:
        """The library does this in its constructor, but only if the processes are already connected by then."""
        codebook = self.quantize._codebook
        codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = distributed.all_reduce
        codebook.sample_fn = codebook.replace_sample_fn = sample_vectors_distributed


class GumbelQuantizer(Quantizer):
    """taming's GumbelQuantize: the encoder gives logits over codes. Sampled in training; otherwise the argmax."""

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
