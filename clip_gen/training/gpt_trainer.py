"""Stage 2: the transformer learns to write a picture's tokens from its CLIP embedding."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from clip_gen.clip_encoder import ClipEncoder
from clip_gen.gpt import GPT
from clip_gen.training.stage import FitConfig, Muon, Stage, adamw, compiled
from clip_gen.vqgan import VQGAN

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class GPTTrainer(Stage):
    """Batches are (conditions (B, E), tokens (B, T), which to draw without one (B,) bool, embeddings (B, E)).

    A condition is the embedding after a push; see dataset.EncodedPictures. `embedding_loss` weighs CLIP-GEN's second
    loss: how far the embedding of the picture decoded from the predicted tokens is from the true one.
    """

    def __init__(
        self,
        gpt: GPT,
        config: FitConfig,
        *,
        embedding_loss: float = 0.0,
        vqgan: VQGAN | None = None,
        clip: ClipEncoder | None = None,
    ):
        super().__init__(config)
        self.gpt, self.embedding_loss = gpt, embedding_loss
        if config.compile:
            compiled(gpt)
        self.frozen = lambda: (vqgan, clip)  # behind a function, so as not to be trained, averaged or saved

    def on_fit_start(self) -> None:
        for network in self.frozen():
            if network is not None:
                network.to(self.device)

    def training_step(self, batch: Batch) -> Tensor:
        conditions, tokens, unconditional, embeddings = batch
        logits = self.gpt(conditions, tokens[:, :-1], unconditional)
        loss = token_loss(logits, tokens)
        values = {"loss": loss.detach()}
        if self.embedding_loss:
            values["embedding"] = embedding_loss(logits, embeddings, *self.frozen())
            loss = loss + self.embedding_loss * values["embedding"]
        self.log_dict(values, batch_size=len(tokens), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        _, tokens, _, embeddings = batch
        loss = token_loss(self.gpt(embeddings, tokens[:, :-1]), tokens)
        self.log("val_loss", loss, batch_size=len(tokens), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        if self.config.muon_rate:
            return self.learning(Muon(self.gpt, self.gpt.blocks, self.config))
        return self.learning(adamw(self.gpt, self.config, betas=(0.9, 0.95)))


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats a token, for logits (B, T, V) and tokens (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def embedding_loss(logits: Tensor, embeddings: Tensor, vqgan: VQGAN, clip: ClipEncoder) -> Tensor:
    """1 minus the cosine of each true embedding (B, E) with that of the picture the likeliest tokens decode to, mean.

    The choice of a token lets gradients through as if it were the softmax: straight-through, arXiv 1308.3432.
    """
    shares = logits.float().softmax(dim=-1)
    chosen = F.one_hot(shares.argmax(dim=-1), shares.shape[-1]).to(shares.dtype)
    straight_through = chosen + shares - shares.detach()
    images = vqgan.decode_mixture(straight_through)
    return (1 - (clip.embed_image(images) * embeddings).sum(dim=1)).mean()
