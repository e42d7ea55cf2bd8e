"""Stage 1: the VQGAN learns to write pictures as tokens and to read them back."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor

from clip_gen.images import from_bytes
from clip_gen.training.schedule import adamw, warmup_cosine
from clip_gen.vqgan import VQGAN


class VQGANTrainer(pl.LightningModule):
    """Batches are pictures, (B, S, S, 3) uint8."""

    def __init__(self, vqgan: VQGAN, *, steps: int, learning_rate: float, warmup: int, weight_decay: float):
        super().__init__()
        self.vqgan = vqgan
        self.steps, self.learning_rate, self.warmup, self.weight_decay = steps, learning_rate, warmup, weight_decay

    def training_step(self, batch: Tensor) -> Tensor:
        images = from_bytes(batch)
        out = self.vqgan(images)
        difference = out.images.float() - images
        # The absolute error keeps edges sharp, the square keeps any one pixel from being far off.
        reconstruction = difference.abs().mean() + difference.square().mean()
        loss = reconstruction + out.loss
        used = torch.bincount(out.tokens.flatten(), minlength=self.vqgan.config.codebook_size) > 0
        self.log_dict({"loss": loss.detach(), "l1": difference.abs().mean(), "codes_in_batch": used.float().mean()})
        return loss

    def validation_step(self, batch: Tensor) -> None:
        images = from_bytes(batch)
        difference = self.vqgan.decode(self.vqgan.encode(images)).float() - images
        # Per picture, in decibels against the full range of 2.
        psnr = 10 * torch.log10(4 / difference.square().mean(dim=(1, 2, 3)).clamp(min=1e-10))
        self.log("val_psnr", psnr.mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = adamw(self.vqgan, self.learning_rate, self.weight_decay, betas=(0.9, 0.95))
        schedule = warmup_cosine(optimizer, self.steps, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
