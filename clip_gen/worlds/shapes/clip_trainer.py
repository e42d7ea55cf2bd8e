"""Trains the small CLIP of this world on pairs of pictures and captions. It takes the place of OpenAI's CLIP.

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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.images import for_clip, from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder, Tokenizer
from clip_gen.training.stage import FitConfig, Stage, adamw, compiled
from clip_gen.worlds.shapes.pairs import CHOICES, UNSAID, PairGroup, answers, fits

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

NAMING_ONLY = 0.15  # share of the steps at the start; beside the contrast, naming takes many times as long to learn
DISTANCE_WEIGHT = 3.0  # the contrast is scaled by up to 100


class Collate:
    """Joins groups to a batch: pictures (n, S, S, 3), text tokens (n, L), stated, shown (n, 9), spoilt (m, S, S, 3)."""

    def __init__(self, context_length: int):
        self.tokenize = Tokenizer(context_length)

    def __call__(self, groups: list[PairGroup]) -> Batch:
        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(group, name) for group in groups]))

        tokens = self.tokenize([caption for group in groups for caption in group.captions])
        return joined("pictures"), tokens, joined("stated"), joined("shown"), joined("spoilt")


class Naming(nn.Module):
    """Reads from an embedding what the picture shows or the caption says."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.scale = embed_dim**0.5  # elements of a unit-length embedding then have a size of about 1
        self.read = nn.Sequential(nn.Linear(embed_dim, 256), nn.GELU(), nn.Linear(256, sum(CHOICES)))

    def forward(self, embedding: Tensor, numbers: Tensor) -> Tensor:
        """Cross-entropy, summed over the questions; each is a mean over the rows of `numbers` (n, 9) that answer it."""
        logits = self.read(self.scale * embedding).float().split(CHOICES, dim=1)
        wanted = answers(numbers).unbind(dim=1)
        asked = [(guess, right) for guess, right in zip(logits, wanted, strict=True) if (right != UNSAID).any()]
        return sum(F.cross_entropy(guess, right, ignore_index=UNSAID) for guess, right in asked)


class ClipTrainer(Stage):
    def __init__(self, encoder: ClipEncoder, config: FitConfig):
        super().__init__(config)
        self.naming = Naming(encoder.config.embed_dim)
        # Not as a submodule: ClipEncoder refuses to leave eval mode, in which batch norms would never learn.
        self.clip = encoder.clip.requires_grad_(True).train()
        if config.compile:
            compiled(self.clip.visual)
            compiled(self.clip.transformer)
        self.resolution = encoder.config.image_resolution
        self.register_buffer("word_seen", torch.zeros(encoder.config.vocab_size, dtype=torch.bool))

    def training_step(self, batch: Batch) -> Tensor:
        pictures, words, stated, shown, spoilt = batch
        self.word_seen[words.flatten()] = True
        images = for_clip(from_bytes(torch.cat([pictures, spoilt])), self.resolution)
        image = F.normalize(self.clip.encode_image(images).float(), dim=-1)
        text = F.normalize(self.clip.encode_text(words).float(), dim=-1)
        # OpenAI's bound: beyond a factor of 100 training turns unstable.
        scale = self.clip.logit_scale.exp().clamp(max=100)
        contrast = contrastive_loss(scale * text @ image.T, stated, shown)
        together = (1 - (text * image[: len(text)]).sum(dim=1)).mean()
        naming = self.naming(image[: len(text)], shown) + self.naming(text, stated)
        values = {"contrast": contrast, "together": together, "naming": naming, "scale": scale}
        self.log_dict({name: value.detach() for name, value in values.items()}, batch_size=len(text))
        if self.global_step < NAMING_ONLY * self.config.steps:
            return naming
        return naming + contrast + DISTANCE_WEIGHT * together

    def validation_step(self, batch: Batch) -> None:
        pictures, words, stated, shown, spoilt = batch
        image = F.normalize(
            self.clip.encode_image(for_clip(from_bytes(torch.cat([pictures, spoilt])), self.resolution))
        )
        text = F.normalize(self.clip.encode_text(words))
        similarity = text @ image.T
        found = similarity.argmax(dim=1)
        right = F.pad(fits(stated, shown), (0, len(spoilt)))[torch.arange(len(text)), found]
        self.log_dict(
            {"val_found": right.float().mean(), "val_cosine": similarity.diagonal().mean()}, batch_size=len(text)
        )

    def configure_optimizers(self) -> dict[str, object]:
        learnt = nn.ModuleList([self.clip, self.naming])
        return self.learning(adamw(learnt, self.config, betas=(0.9, 0.98)))

    @torch.no_grad()
    def clear_unseen_words(self) -> None:
        """Sets the embeddings of words that were never trained to zero instead of their random start."""
        self.clip.token_embedding.weight[~self.word_seen] = 0


def contrastive_loss(logits: Tensor, stated: Tensor, shown: Tensor) -> Tensor:
    """Mean of both directions, for logits (n, n + m) of n texts with their n pictures and m spoilt pictures."""
    n = len(logits)
    answers = torch.arange(n, device=logits.device)
    also_true = fits(stated, shown)
    also_true[answers, answers] = False
    masked = logits.masked_fill(F.pad(also_true, (0, logits.shape[1] - n)), -torch.inf)
    return (F.cross_entropy(masked, answers) + F.cross_entropy(masked[:, :n].T, answers)) / 2
