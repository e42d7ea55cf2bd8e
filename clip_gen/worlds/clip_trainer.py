"""Trains the small CLIP of a world on pairs of pictures and captions. It takes the place of OpenAI's CLIP.

The loss is contrastive as in CLIP (arXiv 2103.00020), with four additions:

- A caption that is true of another picture in the batch is no wrong answer for it.
- Spoilt pictures, which no caption fits, are additional wrong answers.
- The distance within pairs is a loss too: contrast alone leaves a gap between texts and pictures (arXiv 2203.02053),
  which the transformer would have to bridge.
- A small network must read from each embedding what the caption says, similar to the captioner of CoCa (arXiv
  2205.01917). Without it both towers learn a bag of words (arXiv 2210.01936), and not which colour belongs to which
  shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.images import for_clip, from_bytes
from clip_gen.networks.clip_encoder import WORD_END, ClipEncoder
from clip_gen.training.stage import FitConfig, Muon, Stage, adamw, compiled

UNSAID = -1  # an answer that a caption does not give
NAMING_ONLY = 0.15  # share of the steps at the start; beside the contrast, naming takes many times as long to learn
DISTANCE_WEIGHT = 3.0  # the contrast is scaled by up to 100


class Batch(NamedTuple):
    """n pairs of a picture and a caption, and m spoilt pictures. Q: the questions that the world asks of a caption."""

    pictures: Tensor  # (n, S, S, 3) uint8
    spoilt: Tensor  # (m, S, S, 3) uint8
    tokens: Tensor  # (n, L): the captions
    is_true: Tensor  # (n, n) bool: whether caption i is true of picture j
    stated: Tensor  # (n, Q): answers of the captions, or UNSAID
    shown: Tensor  # (n, Q): answers of the pictures, or UNSAID


class Naming(nn.Module):
    """Reads from an embedding what the picture shows or the caption says."""

    def __init__(self, embed_dim: int, choices: Sequence[int]):
        """choices: the number of possible answers to each question."""
        super().__init__()
        self.choices = tuple(choices)
        self.scale = embed_dim**0.5  # elements of a unit-length embedding then have a size of about 1
        self.read = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, sum(choices)))

    def forward(self, embedding: Tensor, answers: Tensor) -> Tensor:
        """Cross-entropy, summed over the questions; each is a mean over the rows of `answers` (n, Q) that answer it."""
        logits = self.read(self.scale * embedding).float().split(self.choices, dim=1)
        asked = [(guess, right) for guess, right in zip(logits, answers.T, strict=True) if (right != UNSAID).any()]
        return sum(F.cross_entropy(guess, right, ignore_index=UNSAID) for guess, right in asked)


class ClipTrainer(Stage):
    def __init__(self, encoder: ClipEncoder, choices: Sequence[int], config: FitConfig):
        super().__init__(config)
        self.naming = Naming(encoder.config.embed_dim, choices)
        # Not as a submodule: ClipEncoder refuses to leave eval mode, in which batch norms would never learn.
        self.clip = encoder.clip.requires_grad_(True).train()
        if config.compile:
            compiled(self.clip.visual)
            compiled(self.clip.transformer)
        self.resolution = encoder.config.image_resolution
        self.register_buffer("word_seen", torch.zeros(encoder.config.vocab_size, dtype=torch.bool))

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings of all pictures, (n + m, E), and of the captions, (n, E)."""
        images = for_clip(from_bytes(torch.cat([batch.pictures, batch.spoilt])), self.resolution)
        image = F.normalize(self.clip.encode_image(images).float(), dim=-1)
        return image, F.normalize(self.clip.encode_text(batch.tokens).float(), dim=-1)

    def training_step(self, batch: Batch) -> Tensor:
        self.word_seen[batch.tokens.flatten()] = True
        image, text = self.embed(batch)
        # OpenAI's bound: beyond a factor of 100 training turns unstable.
        scale = self.clip.logit_scale.exp().clamp(max=100)
        contrast = contrastive_loss(scale * text @ image.T, batch.is_true)
        together = (1 - (text * image[: len(text)]).sum(dim=1)).mean()
        naming = self.naming(image[: len(text)], batch.shown) + self.naming(text, batch.stated)
        values = {"contrast": contrast, "together": together, "naming": naming, "scale": scale}
        self.log_dict({name: value.detach() for name, value in values.items()}, batch_size=len(text))
        if self.global_step < NAMING_ONLY * self.config.steps:
            return naming
        return naming + contrast + DISTANCE_WEIGHT * together

    def validation_step(self, batch: Batch) -> None:
        """The share of captions that are true of the nearest picture, and their mean cosine with their own picture."""
        image, text = self.embed(batch)
        similarity = text @ image.T
        is_true = F.pad(batch.is_true, (0, len(batch.spoilt)))
        right = is_true.gather(1, similarity.argmax(dim=1, keepdim=True))
        values = {"val_found": right.float().mean(), "val_cosine": similarity.diagonal().mean()}
        self.log_dict(values, batch_size=len(text))

    def configure_optimizers(self) -> dict[str, object]:
        learnt = nn.ModuleList([self.clip, self.naming])
        if not self.config.muon_rate:
            return self.learning(adamw(learnt, self.config, betas=(0.9, 0.98)))
        towers = [*self.clip.visual.named_parameters(), *self.clip.transformer.named_parameters()]
        # The matrices of the attention pool are so large that Muon's products with them take half of a step.
        matrices = [weight for name, weight in towers if weight.dim() in (2, 4) and not name.startswith("attnpool.")]
        return self.learning(Muon(learnt, matrices, self.config))

    @torch.no_grad()
    def clear_unseen_words(self) -> None:
        """Sets the embeddings of words that were never trained to zero instead of their random start."""
        self.clip.token_embedding.weight[~self.word_seen] = 0


@torch.no_grad()
def fill_unseen_words(encoder: ClipEncoder, synonyms: Mapping[str, Mapping[str, float]]) -> None:
    """Replaces zero embeddings of words that were never trained by weighted means of trained words' embeddings.

    synonyms: for a word, weights of trained words. Those that are not one token each are left to learn_words. Words
    with an embedding keep it; those without a trained synonym stay zero, and so unknown.
    """
    table, numbers = encoder.clip.token_embedding.weight, encoder.tokenize.bpe.encoder
    is_trained = table.any(dim=1).tolist()
    for word, weights in synonyms.items():
        known = {numbers.get(other + WORD_END): weight for other, weight in weights.items()}
        known = {token: weight for token, weight in known.items() if token is not None and is_trained[token]}
        token = numbers.get(word + WORD_END)
        if known and token is not None and not is_trained[token]:
            shares = table.new_tensor(list(known.values()))
            table[token] = shares @ table[list(known)] / shares.sum()


def contrastive_loss(logits: Tensor, is_true: Tensor) -> Tensor:
    """Mean of both directions, for logits (n, n + m) of n texts with their n pictures and m spoilt pictures.

    is_true: (n, n) bool, whether a text is true of a picture; then it is no wrong answer for that picture.
    """
    own = torch.arange(len(logits), device=logits.device)
    others = is_true.clone().fill_diagonal_(False)
    masked = logits.masked_fill(F.pad(others, (0, logits.shape[1] - len(logits))), -torch.inf)
    return (F.cross_entropy(masked, own) + F.cross_entropy(masked[:, : len(logits)].T, own)) / 2
