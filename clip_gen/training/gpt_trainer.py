"""Stage 2: the transformer learns to write a picture's tokens from its CLIP embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.muon import Muon
from clip_gen.training.stage import FitConfig, Stage, adamw, compiled

Batch = tuple[Tensor, ...]
# Without `neighbour_context`, the share of the stage after which all positions of an image are trained on again.
WHOLE_FROM = 2 / 3


class GPTTrainer(Stage):
    """Batches are conditions (B, E), tokens (B, T), which to draw without one (B,) bool, embeddings (B, E), those of
    near misses (B, E) and, where not all of them are learnt from, places (B, K) and their chances (B, K); see
    dataset.EncodedPictures.

    `embedding_loss` weighs CLIP-GEN's second loss: how far the embedding of the picture decoded from the predicted
    tokens is from the true one. `contrast` weighs how surely a picture is told to be its own condition's rather than
    its near miss's, in nats beside the nats of the whole picture: the few tokens on which the two differ are next to
    nothing among all, and what belongs to which is learnt late or never. After condition contrastive alignment, arXiv
    2410.09347.
    """

    def __init__(
        self,
        gpt: GPT,
        config: FitConfig,
        *,
        contrast: float = 0.0,
        embedding_loss: float = 0.0,
        vqgan: VQGAN | None = None,
        clip: ClipEncoder | None = None,
    ):
        super().__init__(config)
        self.gpt, self.contrast, self.embedding_loss = gpt, contrast, embedding_loss
        if config.compile:
            compiled(gpt)
        self.frozen = lambda: (vqgan, clip)  # behind a function, so as not to be trained, averaged or saved

    def on_fit_start(self) -> None:
        for network in self.frozen():
            if network is not None:
                network.to(self.device)

    def training_step(self, batch: Batch) -> Tensor:
        conditions, tokens, unconditional, embeddings, near_misses, *sampled = batch
        count, length = tokens.shape
        assert not (sampled and self.embedding_loss), "it looks at whole pictures"
        if self.gpt.around is None and max(self.global_step / self.config.steps, self.time_spent) >= WHOLE_FROM:
            sampled = []
        rows = torch.arange(count, device=tokens.device)  # whose tokens each row of the network's batch has
        if self.contrast:
            differs = (near_misses != conditions).any(dim=1) & ~unconditional
            # Always a quarter as many, whoever differs, so that the network is compiled for one shape. They stand for
            # all that differ.
            missed = differs.float().topk(max(1, count // 4)).indices
            standing_for = differs.sum() / differs[missed].sum().clamp(min=1)
            rows, conditions = torch.cat([rows, missed]), torch.cat([conditions, near_misses[missed]])
        sampled = [each[rows] for each in sampled]
        logits = self.gpt(conditions, tokens[rows, :-1], unconditional[rows], *sampled)
        if sampled:
            places, chances = sampled
            nats = token_nats(logits, tokens[rows].gather(1, places)) / chances
        else:
            nats = token_nats(logits, tokens[rows])
        loss = nats[:count].sum() / (count * length)
        values = {"loss": loss}
        if self.contrast:
            surer = (nats[count:] - nats[missed]).sum(dim=1)
            values["contrast"] = standing_for * (differs[missed] * F.softplus(-surer)).sum() / count
            loss = loss + self.contrast * values["contrast"] / length
        if self.embedding_loss:
            values["embedding"] = embedding_loss(logits[:count], embeddings, *self.frozen())
            loss = loss + self.embedding_loss * values["embedding"]
        self.log_means(values, count)
        return loss

    def validation_step(self, batch: Batch) -> None:
        _, tokens, _, embeddings, _ = batch
        # Compiling once more, for whole pictures without gradients, takes longer than it saves on so few.
        with torch.compiler.set_stance("force_eager"):
            loss = token_loss(self.gpt(embeddings, tokens[:, :-1]), tokens)
        self.log("val_loss", loss, batch_size=len(tokens), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        if self.config.muon_rate:
            matrices = [parameter for parameter in self.gpt.blocks.parameters() if parameter.dim() == 2]
            if self.gpt.around is not None:
                matrices.append(self.gpt.around.weight)
            return self.learning(Muon(self.gpt, matrices, self.config))
        return self.learning(adamw(self.gpt, self.config, betas=(0.9, 0.95)))


@torch.no_grad()
def start_from_codes(gpt: GPT, vqgan: VQGAN, seed: int) -> None:
    """Tokens of like squares start alike: with a random picture of their codes, of a tenth in each direction."""
    codes = F.normalize(vqgan.quantizer.lookup(torch.arange(gpt.config.codebook_size)[None])[0], dim=1)
    directions = torch.randn(codes.shape[1], gpt.config.n_embd, generator=torch.Generator().manual_seed(seed))
    gpt.token_embedding.weight.copy_(0.1 * codes @ directions)


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """How unlikely each token was held, (B, T), for logits (B, T, V) and tokens (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view(tokens.shape)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats a token, the mean."""
    return token_nats(logits, tokens).mean()


def embedding_loss(logits: Tensor, embeddings: Tensor, vqgan: VQGAN, clip: ClipEncoder) -> Tensor:
    """1 minus the cosine of each true embedding (B, E) with that of the picture the likeliest tokens decode to, mean.

    The choice of a token lets gradients through as if it were the softmax: straight-through, arXiv 1308.3432.
    """
    shares = logits.float().softmax(dim=-1)
    chosen = F.one_hot(shares.argmax(dim=-1), shares.shape[-1]).to(shares.dtype)
    straight_through = chosen + shares - shares.detach()
    images = vqgan.decode_mixture(straight_through)
    return (1 - (clip.embed_image(images) * embeddings).sum(dim=1)).mean()
