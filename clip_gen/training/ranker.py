"""CLIP's image tower learns what the generator's pictures look like, so as to rank them. Nothing else changes.

What the generator draws for a caption stands among the wrong answers to it, as what a GAN's discriminator is shown
does: where a drawn picture is as good as a true one the two cancel out, and what is left is what goes wrong in drawing.
True pictures go through the VQGAN half the time, so that its own marks give nothing away. The text tower is frozen, and
so is what prompts become; what true pictures become is held in place.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from clip_gen.checkpoint import Networks
from clip_gen.clip_encoder import ClipEncoder
from clip_gen.gpt import multiplies_bfloat16
from clip_gen.images import for_clip, from_bytes, to_bytes
from clip_gen.sampling import Sampling, candidate_uniforms, sample_tokens
from clip_gen.shapes.pairs import CaptionedPairs, PairGroup
from clip_gen.training.clip_trainer import Batch, contrastive_loss
from clip_gen.training.dataset import whole_array
from clip_gen.training.stage import FitConfig, Stage, adamw, compiled
from clip_gen.vqgan import VQGAN

log = logging.getLogger(__name__)

TOGETHER = 128  # drawn in one batch
TEMPERATURES = (1.0, 1.0, 1.2)  # in turn: wilder pictures show more of what can go wrong


class DrawnPairs(Dataset):
    """Groups of pairs, what was drawn for the first caption of each among the spoilt; sample n without end."""

    def __init__(self, pairs: CaptionedPairs, drawn: Path):
        self.pairs, self.drawn = pairs, np.load(drawn, mmap_mode="r")  # (N, S, S, 3) uint8

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, number: int) -> PairGroup:
        index = number % len(self.drawn)
        group = self.pairs[index]
        return group._replace(spoilt=np.concatenate([group.spoilt, self.drawn[index][None]]))


@torch.inference_mode()
def draw_pictures(networks: Networks, pairs: CaptionedPairs, seed: int, path: Path) -> Path:
    """One picture for the first caption of each group, which may leave things out, as a .npy (N, S, S, 3) uint8."""
    if path.is_file():
        return path
    config, device = networks.config, next(networks.gpt.parameters()).device
    gpt = deepcopy(networks.gpt)
    if multiplies_bfloat16(device):
        gpt.work_in(torch.bfloat16)
    side = config.vqgan.resolution
    with whole_array(path, (len(pairs), side, side, 3), np.uint8) as rows:
        for turn, start in enumerate(range(0, len(pairs), TOGETHER)):
            indices = range(start, min(start + TOGETHER, len(pairs)))
            prompts = [pairs[index].captions[0] for index in indices]
            condition = networks.bridge(networks.clip.encode_text(prompts))
            uniforms = candidate_uniforms(seed, indices, config.gpt.block_size)
            temperature = TEMPERATURES[turn % len(TEMPERATURES)]
            tokens = sample_tokens(gpt, condition, uniforms, Sampling(temperature))
            rows[start : indices.stop] = to_bytes(networks.vqgan.decode(tokens)).cpu().numpy()
            log.info("%s: %d of %d pictures drawn", path.name, indices.stop, len(pairs))
    return path


class RankerTrainer(Stage):
    """Batches as ClipTrainer's, the drawn pictures among the spoilt."""

    def __init__(self, encoder: ClipEncoder, vqgan: VQGAN, config: FitConfig):
        super().__init__(config)
        before = deepcopy(encoder.clip.visual).eval().requires_grad_(False)
        # Not as submodules, so as not to be trained, averaged or saved.
        self.frozen = lambda: (encoder.clip, vqgan, before)
        self.visual = encoder.clip.visual.requires_grad_(True).train()
        if config.compile:
            compiled(self.visual)
        self.resolution = encoder.config.image_resolution

    def on_fit_start(self) -> None:
        for network in self.frozen():
            network.to(self.device)

    def training_step(self, batch: Batch) -> Tensor:
        pictures, words, stated, shown, spoilt = batch
        clip, vqgan, before = self.frozen()
        true = from_bytes(pictures)
        with torch.no_grad():
            text = F.normalize(clip.encode_text(words).float(), dim=-1)
            wanted = F.normalize(before(for_clip(true, self.resolution)).float(), dim=-1)
            through = vqgan.decode(vqgan.encode(true)).float()
        half = torch.rand(len(true), 1, 1, 1, device=true.device) < 0.5
        image = self._embed(torch.cat([torch.where(half, through, true), from_bytes(spoilt)]))
        scale = clip.logit_scale.exp().clamp(max=100)
        contrast = contrastive_loss(scale * text @ image.T, stated, shown)
        moved = (1 - (image[: len(true)] * wanted).sum(dim=1)).mean()
        self.log_dict({"contrast": contrast.detach(), "moved": moved.detach()}, batch_size=len(text))
        return contrast + moved

    def validation_step(self, batch: Batch) -> None:
        """The share of captions nearer to their picture, sent through the VQGAN, than to what was drawn for them."""
        pictures, words, _, _, spoilt = batch
        clip, vqgan, _ = self.frozen()
        groups = len(spoilt) // 2
        first = from_bytes(pictures)[:: len(pictures) // groups]
        text = F.normalize(clip.encode_text(words)[:: len(pictures) // groups].float(), dim=-1)
        true, drawn = self._embed(torch.cat([vqgan.decode(vqgan.encode(first)), from_bytes(spoilt)[1::2]])).chunk(2)
        nearer = (text * true).sum(dim=1) > (text * drawn).sum(dim=1)
        self.log_dict({"val_nearer": nearer.float().mean()}, batch_size=groups)

    def _embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(for_clip(images, self.resolution)).float(), dim=-1)

    def configure_optimizers(self) -> dict[str, object]:
        return self.learning(adamw(self.visual, self.config, betas=(0.9, 0.98)))
