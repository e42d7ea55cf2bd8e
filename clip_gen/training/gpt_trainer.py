"""Stage 2: trains the transformer to predict an image's tokens from its CLIP embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.stage import FitConfig, Muon, Stage, adamw, compiled, recompute_activations

# Without `neighbour_context`, the fraction of the stage after which all positions of an image are trained on again.
WHOLE_FROM = 2 / 3
MAX_ROUNDING = 1e-3  # between two float16 encodings of one image, by networks compiled differently


class GPTTrainer(Stage):
    """Trains the transformer on batches of EncodedPictures.

    A batch is conditions (B, E), tokens (B, T), whether to drop the condition (B,) bool, embeddings (B, E), and
    embeddings of near misses (B, E). If only some positions are trained on, these places (B, K) follow with their
    probabilities (B, K).

    embedding_loss: the weight of CLIP-GEN's second loss, the distance between the true embedding and that of the image
    decoded from the predicted tokens.
    contrast: the weight of a loss that makes an image likelier under its own condition than under its near miss's, in
    nats per image. The few tokens on which the two differ hardly count in the mean over all tokens, so without it
    details are learnt late or never. After condition contrastive alignment, arXiv 2410.09347.
    context_noise: the share of images that see other_tokens among those before a position. With true tokens alone, the
    transformer learns to go by them and hardly by the condition, and when it draws, one wrong token leads to the next.
    """

    def __init__(
        self,
        gpt: GPT,
        config: FitConfig,
        *,
        contrast: float = 0.0,
        context_noise: float = 0.0,
        embedding_loss: float = 0.0,
        vqgan: VQGAN | None = None,
        clip: ClipEncoder | None = None,
    ):
        super().__init__(config, frozen=[vqgan, clip] if vqgan else [])
        self.gpt, self.contrast, self.context_noise, self.embedding_loss = gpt, contrast, context_noise, embedding_loss
        if config.gradient_checkpointing:
            recompute_activations(gpt.blocks)
        if config.compile:
            compiled(gpt)

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        conditions, tokens, unconditional, embeddings, near_misses, *sampled = batch
        count, length = tokens.shape
        assert not (sampled and self.embedding_loss), "the embedding loss needs whole images"
        if self.gpt.around is None and self.fraction_done >= WHOLE_FROM:
            sampled = []
        rows = torch.arange(count, device=tokens.device)  # the image of each row of the network's batch
        if self.contrast:
            differs = ((near_misses - conditions).abs() > MAX_ROUNDING).any(dim=1) & ~unconditional
            # A constant quarter of the images, so the network is compiled for one shape. It stands for all that differ.
            missed = differs.float().topk(max(1, count // 4)).indices
            scale = differs.sum() / differs[missed].sum().clamp(min=1)
            rows, conditions = torch.cat([rows, missed]), torch.cat([conditions, near_misses[missed]])
        sampled = [part[rows] for part in sampled]
        context = self.noisy(tokens) if self.context_noise else tokens
        logits = self.gpt(conditions, context[rows, :-1], unconditional[rows], *sampled)
        nats = token_nats(logits, tokens[rows], *sampled)
        loss = nats[:count].sum() / (count * length)
        values = {"loss": loss}
        if self.contrast:
            gain = (nats[count:] - nats[missed]).sum(dim=1)  # of the true condition over the near miss
            values["contrast"] = scale * (differs[missed] * F.softplus(-gain)).sum() / count
            loss = loss + self.contrast * values["contrast"] / length
        if self.embedding_loss:
            values["embedding"] = embedding_loss(logits[:count], embeddings, *self.frozen)
            loss = loss + self.embedding_loss * values["embedding"]
        self.log_dict(values, batch_size=count, sync_dist=True)
        return loss

    def noisy(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), of which a share of the images has some of another image, at a rate from 0 to 1."""
        chosen, rates = torch.rand(2, len(tokens), 1, device=tokens.device)
        replaced = torch.rand(tokens.shape, device=tokens.device) < rates * (chosen < self.context_noise)
        return torch.where(replaced, tokens.roll(1, dims=0), tokens)

    def validation_step(self, batch: tuple[Tensor, ...]) -> None:
        _, tokens, _, embeddings, _ = batch
        # A second compilation, for whole images without gradients, would take longer than it saves.
        with torch.compiler.set_stance("force_eager"):
            loss = token_nats(self.gpt(embeddings, tokens[:, :-1]), tokens).mean()
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
    """Initialises token embeddings with a random projection of the codes, of length about 0.1 per dimension, so tokens
    of similar image patches start similar.
    """
    codes = F.normalize(vqgan.quantizer.lookup(torch.arange(gpt.config.codebook_size)[None])[0], dim=1)
    directions = torch.randn(codes.shape[1], gpt.config.n_embd, generator=torch.Generator().manual_seed(seed))
    gpt.token_embedding.weight.copy_(0.1 * codes @ directions)


def token_nats(
    logits: Tensor, tokens: Tensor, places: Tensor | None = None, probabilities: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each token in nats, (B, T), for logits (B, T, V) and tokens (B, T).

    With places (B, K) and their probabilities (B, K): (B, K), for logits (B, K, V), divided by the probabilities, so
    the sum estimates that of all tokens.
    """
    tokens = tokens if places is None else tokens.gather(1, places)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view(tokens.shape)
    return nats if probabilities is None else nats / probabilities


def embedding_loss(logits: Tensor, embeddings: Tensor, vqgan: VQGAN, clip: ClipEncoder) -> Tensor:
    """The mean of 1 minus the cosine between embeddings (B, E) and those of the images that the likeliest tokens give.

    Gradients pass through the choice of tokens as if it were the softmax: straight-through, arXiv 1308.3432.
    """
    shares = logits.float().softmax(dim=-1)
    chosen = F.one_hot(shares.argmax(dim=-1), shares.shape[-1]).to(shares.dtype)
    straight_through = chosen + shares - shares.detach()
    images = vqgan.decode_mixture(straight_through)
    return (1 - (clip.embed_image(images) * embeddings).sum(dim=1)).mean()
