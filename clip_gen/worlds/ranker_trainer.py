"""Trains CLIP's image tower on generated pictures, so that it ranks them better. Nothing else changes.

The embedding of a caption must be closer to its own picture than to a picture sampled for it, similar to a GAN's
discriminator. It must also be closer than to its own picture with some tokens resampled, which has small faults and no
other difference. The same holds for a shorter caption, which is true of more of the sampled pictures, so that quality
is the main difference. All three pictures are decoded by the VQGAN, so that its artefacts are no clue. One more loss
compares the picture before and after the VQGAN.

The text tower is frozen, so prompts keep their embeddings; a loss keeps the embeddings of true pictures in place.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from clip_gen.hardware import choose_dtype, on_device
from clip_gen.images import for_clip, from_bytes, to_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, draw, sample_tokens
from clip_gen.training.datasets import loader_with_workers
from clip_gen.training.encoding import save_array
from clip_gen.training.stage import FitConfig, Stage, adamw, compiled
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

BATCH_SIZE = 128  # pictures sampled in one batch
FILE_SIZE = 32 * BATCH_SIZE  # captions per file; interrupted sampling resumes after the last complete file
TEMPERATURES = (1.0, 1.1, 1.2, 1.3)  # of the batches in turn: higher ones show more faults
RESAMPLED_SHARES = (0.1, 0.3, 0.6, 1.0)  # of a picture's tokens
KEEP_WEIGHT = 6.0  # of the loss that keeps true pictures in place

Batch = tuple[Tensor, Tensor]


class RankedPictures(Dataset):
    """Item n: the embeddings of a caption and of a shorter one (2, E) float32, and four pictures (4, S, S, 3) uint8.

    The pictures are the caption's own, its reconstruction by the VQGAN, the same with some tokens resampled, and one
    sampled for the caption. Items repeat without end, in every second round with all four pictures mirrored.
    """

    def __init__(self, parts: list[tuple[Path, Path]]):
        """parts: .npy files of embeddings (N, 2, E) and pictures (N, 4, S, S, 3); N is FILE_SIZE except in the last."""
        self.texts = np.concatenate([np.load(texts) for texts, _ in parts])
        self.pictures = [np.load(pictures, mmap_mode="r") for _, pictures in parts]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        round_, row = divmod(number, len(self))
        pictures = self.pictures[row // FILE_SIZE][row % FILE_SIZE]
        return self.texts[row], (pictures[:, :, ::-1] if round_ % 2 else pictures).copy()


def ranked_pictures(networks: Networks, pictures: Dataset, seed: int, folder: Path, name: str) -> RankedPictures:
    """Samples for `pictures`, whose items are a picture (S, S, 3) uint8 with a caption and a shorter caption.

    Files that the folder already has are not made again.
    """
    parts = []
    for start in range(0, len(pictures), FILE_SIZE):
        numbers = range(start, min(start + FILE_SIZE, len(pictures)))
        texts, samples = (folder / f"{name}-{what}-{start // FILE_SIZE:03d}.npy" for what in ("texts", "pictures"))
        if not samples.is_file():
            _sample(networks, pictures, numbers, seed, texts, samples)
        parts.append((texts, samples))
    return RankedPictures(parts)


@torch.inference_mode()
def _sample(networks: Networks, pictures: Dataset, numbers: range, seed: int, texts: Path, samples: Path) -> None:
    """Writes the two files of the items with these numbers."""
    config, gpt = networks.config, deepcopy(networks.gpt)
    side, length = config.vqgan.resolution, config.gpt.block_size
    loader = loader_with_workers(Subset(pictures, numbers), batch_size=BATCH_SIZE, collate_fn=list)
    shown = np.empty((len(numbers), 4, side, side, 3), np.uint8)
    rows = np.empty((len(numbers), 2, config.clip.embed_dim), np.float32)
    with on_device(gpt, networks.clip, networks.vqgan, networks.bridge) as device:
        gpt.cast_for_inference(choose_dtype("auto", device))
        for start, items in zip(range(0, len(numbers), BATCH_SIZE), loader, strict=True):
            indices = numbers[start : start + BATCH_SIZE]
            batch, here = indices[0] // BATCH_SIZE, slice(start, start + len(indices))
            own, captions = zip(*items, strict=True)
            true = torch.stack(own)
            text = torch.stack([networks.clip.encode_text(column) for column in zip(*captions, strict=True)], dim=1)
            prompts, tokens = networks.bridge(text[:, 0]), networks.vqgan.encode(from_bytes(true.to(device)))
            sampling = Sampling(temperature=TEMPERATURES[batch % len(TEMPERATURES)])
            random = candidate_uniforms(seed, indices, length + 1)
            drawn = sample_tokens(gpt, networks.bridge.conditions(prompts, random[:, -1:]), random[:, :-1], sampling)
            resampled = resample_tokens(gpt, prompts, tokens, np.random.default_rng([seed, batch]))
            rows[here] = text.cpu().numpy()
            shown[here, 0] = true.numpy()
            for place, decoded in enumerate((tokens, resampled, drawn), start=1):
                shown[here, place] = to_bytes(networks.vqgan.decode(decoded)).cpu().numpy()
            log.info("%s: sampled for %d captions", samples.name, here.stop)
    save_array(texts, rows)
    save_array(samples, shown)  # last, so it exists when both are complete


def resample_tokens(gpt: GPT, condition: Tensor, tokens: Tensor, rng: np.random.Generator) -> Tensor:
    """Replaces a random share of each row of tokens (B, T) by tokens sampled from their predecessors in the row."""
    probabilities = gpt(condition, tokens[:, :-1]).float().softmax(dim=2)
    uniforms = torch.from_numpy(rng.random(tokens.shape, np.float32)).to(tokens.device)
    sampled = draw(probabilities.flatten(0, 1), uniforms.flatten()).view(tokens.shape)
    shares = rng.choice(RESAMPLED_SHARES, size=(len(tokens), 1))
    chosen = torch.from_numpy(rng.random(tokens.shape) < shares).to(tokens.device)
    return torch.where(chosen, sampled, tokens)


class RankerTrainer(Stage):
    """Trains on batches of RankedPictures."""

    def __init__(self, encoder: ClipEncoder, config: FitConfig):
        super().__init__(config, frozen=[deepcopy(encoder.clip.visual).eval().requires_grad_(False)])
        self.visual = encoder.clip.visual.requires_grad_(True).train()
        if config.compile:
            compiled(self.visual)
        self.resolution = encoder.config.image_resolution
        self.scale = float(encoder.clip.logit_scale.exp().clamp(max=100))

    def training_step(self, batch: Batch) -> Tensor:
        text, pictures = batch
        with torch.no_grad():
            wanted = self._embed(self.frozen[0], pictures[:, :1])[0]
        true, decoded, resampled, drawn = self._embed(self.visual, pictures)
        leads = torch.stack([true - decoded, decoded - resampled, decoded - drawn])
        nearer = F.softplus(-self.scale * (leads[:, :, None] * text).sum(dim=3)).mean(dim=(1, 2))
        moved = (2 - ((true + decoded) * wanted).sum(dim=1)).mean() / 2
        values = {"through": nearer[0], "touched": nearer[1], "drawn": nearer[2], "moved": moved}
        self.log_dict({name: value.detach() for name, value in values.items()}, batch_size=len(text))
        return nearer.sum() + KEEP_WEIGHT * moved

    def validation_step(self, batch: Batch) -> None:
        """The shares of captions that are closer to their decoded picture than to the resampled and the drawn one."""
        text, pictures = batch
        decoded, resampled, drawn = self._embed(self.visual, pictures[:, 1:])
        nearer = ((decoded - torch.stack([resampled, drawn])) * text[:, 0]).sum(dim=2) > 0
        shares = nearer.float().mean(dim=1)
        self.log_dict({"val_touched": shares[0], "val_drawn": shares[1]}, batch_size=len(text))

    def _embed(self, visual: nn.Module, pictures: Tensor) -> Tensor:
        """(B, n, S, S, 3) uint8 -> (n, B, E), unit length."""
        images = for_clip(from_bytes(pictures.transpose(0, 1).flatten(0, 1)), self.resolution)
        return F.normalize(visual(images).float(), dim=-1).unflatten(0, (-1, len(pictures)))

    def configure_optimizers(self) -> dict[str, object]:
        return self.learning(adamw(self.visual, self.config, betas=(0.9, 0.98)))
