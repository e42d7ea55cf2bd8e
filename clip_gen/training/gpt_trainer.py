"""Stage 2: the transformer learns to write a picture's tokens from its CLIP embedding."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.bridge import add_noise
from clip_gen.gpt import GPT
from clip_gen.training.schedule import Muon, warmup_cosine


class GPTTrainer(pl.LightningModule):
    """Batches are (embeddings (B, E), tokens (B, T)), encoded once before."""

    def __init__(
        self,
        gpt: GPT,
        *,
        steps: int,
        learning_rate: float,
        warmup: int,
        weight_decay: float,
        muon_rate: float,
        embedding_noise: float,
        condition_dropout: float,
    ):
        super().__init__()
        self.gpt = gpt
        self.steps, self.learning_rate, self.warmup, self.weight_decay = steps, learning_rate, warmup, weight_decay
        self.muon_rate = muon_rate
        self.embedding_noise, self.condition_dropout = embedding_noise, condition_dropout

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        embedding, tokens = batch
        # Each picture at a strength of its own, so that clean and far-off embeddings are both at home.
        strength = self.embedding_noise * torch.rand(len(embedding), 1, device=embedding.device)
        unconditional = torch.rand(len(embedding), device=embedding.device) < self.condition_dropout
        loss = self._loss(add_noise(embedding, strength), tokens, unconditional)
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        embedding, tokens = batch
        self.log("val_loss", self._loss(embedding, tokens, None))

    def _loss(self, embedding: Tensor, tokens: Tensor, unconditional: Tensor | None) -> Tensor:
        """Nats a token."""
        logits = self.gpt(embedding, tokens[:, :-1], unconditional)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = Muon(self.gpt.blocks, self.gpt, self.muon_rate, self.learning_rate, self.weight_decay)
        schedule = warmup_cosine(optimizer, self.steps, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
