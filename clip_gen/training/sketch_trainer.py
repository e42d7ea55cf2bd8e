"""Trains the transformer's sketch to predict an image's tokens from its condition alone, before stage 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clip_gen.networks.gpt import GPT, project_condition
from clip_gen.training.gpt_trainer import token_nats
from clip_gen.training.stage import FitConfig, Stage, adamw

SKETCH_PLACES = 64  # in a picture that it trains on: more pictures teach more than more places


class Sketching(nn.Module):
    """What the sketch of a transformer depends on: its tensors, under the same names as in the transformer."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.condition, self.null_condition, self.sketch = gpt.condition, gpt.null_condition, gpt.sketch

    @torch.no_grad()
    def start_from(self, embeddings: Tensor) -> None:
        """Initialises the condition as a rotation of centred embeddings (N, E), with elements of a size of about 1."""
        centre = embeddings.mean(dim=0)
        scale = (embeddings - centre).square().mean().rsqrt()
        nn.init.orthogonal_(self.condition.weight)
        self.condition.weight.mul_(scale)
        self.condition.bias.copy_(-self.condition.weight @ centre)

    def forward(self, conditions: Tensor, unconditional: Tensor, places: Tensor | None = None) -> Tensor:
        """Logits (B, K, V), as GPT.forward, of places (B, K) or of all positions."""
        prefix = project_condition(self.condition, self.null_condition, conditions, unconditional)
        return self.sketch.head(self.sketch(prefix, places))


class SketchTrainer(Stage):
    """Trains on batches of EncodedPictures, as GPTTrainer does. Without weights for their probabilities: edges, which
    are most of the places, teach more than plain background.
    """

    def __init__(self, gpt: GPT, config: FitConfig):
        super().__init__(config)
        self.sketching = Sketching(gpt)

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        conditions, tokens, unconditional, _, _, *sampled = batch
        places = sampled[0] if sampled else None
        loss = token_nats(self.sketching(conditions, unconditional, places), tokens, places).mean()
        self.log("loss", loss, batch_size=len(tokens), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, ...]) -> None:
        _, tokens, unconditional, embeddings, _ = batch
        logits = self.sketching(embeddings, unconditional)
        plain = tokens == tokens.mode(dim=1, keepdim=True).values  # mostly background
        values = {
            "val_loss": token_nats(logits, tokens).mean(),
            "val_found": (logits.argmax(dim=2) == tokens)[~plain].float().mean(),
        }
        self.log_dict(values, batch_size=len(tokens), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        return self.learning(adamw(self.sketching, self.config, betas=(0.9, 0.95)))
