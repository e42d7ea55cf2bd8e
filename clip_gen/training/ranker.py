"""CLIP's image tower learns what the generator's pictures look like, so as to rank them. Nothing else changes.

A caption is to be nearer to the picture it tells of than to one that the generator drew for it, as a GAN's
discriminator tells the two apart: where the drawn picture is as good the two cancel out, and what is left is what goes
wrong in drawing. And nearer than to the same picture with some tokens written anew, which has dents and crumbs and
differs in nothing else. All three come out of the VQGAN, so that its marks give nothing away; how much they spoil a
picture is learnt apart, from the one before it went in.

The text tower is frozen, and so is what prompts become; what true pictures become is held in place.
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
from clip_gen.gpt import GPT, multiplies_bfloat16
from clip_gen.images import for_clip, from_bytes, to_bytes
from clip_gen.sampling import Sampling, candidate_uniforms, draw, sample_tokens
from clip_gen.shapes.pairs import CaptionedPairs
from clip_gen.training.dataset import whole_array
from clip_gen.training.stage import FitConfig, Stage, adamw, compiled

log = logging.getLogger(__name__)

TOGETHER = 128  # pictures made in one batch
TEMPERATURES = (1.0, 1.1, 1.2, 1.3)  # of the batches in turn: wilder pictures show more of what can go wrong
TOUCHED = (0.1, 0.3, 0.6, 1.0)  # shares of a picture's tokens that are written anew
HELD = 6.0  # weight of holding true pictures in place

Batch = tuple[Tensor, Tensor]


class RankedPictures(Dataset):
    """Caption n's embedding (E,) float32, and four pictures (4, S, S, 3) uint8: its own as it is and through the
    VQGAN, the same with some tokens written anew, and one drawn for the caption. Without end: every other time they
    are mirrored, all four of them, so that left and right are as wrong in one as in the next.
    """

    def __init__(self, texts: Path, pictures: Path):
        self.texts, self.pictures = np.load(texts, mmap_mode="r"), np.load(pictures, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        time, row = divmod(number, len(self.pictures))
        pictures = self.pictures[row]
        return self.texts[row].copy(), (pictures[:, :, ::-1] if time % 2 else pictures).copy()


@torch.inference_mode()
def ranked_pictures(networks: Networks, pairs: CaptionedPairs, seed: int, folder: Path, name: str) -> RankedPictures:
    """Made for the first caption of each group, which may leave things out; kept in the folder as two .npy."""
    texts, pictures = folder / f"{name}-texts.npy", folder / f"{name}.npy"
    if pictures.is_file():
        return RankedPictures(texts, pictures)
    config, device = networks.config, next(networks.gpt.parameters()).device
    gpt = deepcopy(networks.gpt)
    if multiplies_bfloat16(device):
        gpt.work_in(torch.bfloat16)
    count, side, length = len(pairs), config.vqgan.resolution, config.gpt.block_size
    shape = (count, 4, side, side, 3)
    with (
        whole_array(pictures, shape, np.uint8) as shown,  # there last, and so only when both are whole
        whole_array(texts, (count, config.clip.embed_dim), np.float32) as rows,
    ):
        for turn, start in enumerate(range(0, count, TOGETHER)):
            indices = range(start, min(start + TOGETHER, count))
            firsts = [pairs.first(index) for index in indices]
            true = torch.from_numpy(np.stack([picture for picture, _ in firsts]))
            text = networks.clip.encode_text([caption for _, caption in firsts])
            condition, tokens = networks.bridge(text), networks.vqgan.encode(from_bytes(true.to(device)))
            sampling = Sampling(TEMPERATURES[turn % len(TEMPERATURES)])
            drawn = sample_tokens(gpt, condition, candidate_uniforms(seed, indices, length), sampling)
            touched = written_anew(gpt, condition, tokens, np.random.default_rng([seed, turn]))
            rows[start : indices.stop] = text.cpu().numpy()
            shown[start : indices.stop, 0] = true.numpy()
            for place, made in enumerate((tokens, touched, drawn), start=1):
                shown[start : indices.stop, place] = to_bytes(networks.vqgan.decode(made)).cpu().numpy()
            log.info("%s: %d of %d captions drawn for", pictures.name, indices.stop, count)
    return RankedPictures(texts, pictures)


def written_anew(gpt: GPT, condition: Tensor, tokens: Tensor, rng: np.random.Generator) -> Tensor:
    """Tokens (B, T) of which a share, another for each row, is drawn again, each as what follows the ones before it."""
    probabilities = gpt(condition, tokens[:, :-1]).float().softmax(dim=2)
    uniforms = torch.from_numpy(rng.random(tokens.shape, np.float32)).to(tokens.device)
    anew = draw(probabilities.flatten(0, 1), uniforms.flatten()).view(tokens.shape)
    shares = rng.choice(TOUCHED, size=(len(tokens), 1))
    chosen = torch.from_numpy(rng.random(tokens.shape) < shares).to(tokens.device)
    return torch.where(chosen, anew, tokens)


class RankerTrainer(Stage):
    """Batches as RankedPictures has them."""

    def __init__(self, encoder: ClipEncoder, config: FitConfig):
        super().__init__(config)
        before = deepcopy(encoder.clip.visual).eval().requires_grad_(False)
        # Not as a submodule, so as not to be trained, averaged or saved.
        self.before = lambda: before
        self.visual = encoder.clip.visual.requires_grad_(True).train()
        if config.compile:
            compiled(self.visual)
        self.resolution = encoder.config.image_resolution
        self.scale = float(encoder.clip.logit_scale.exp().clamp(max=100))

    def on_fit_start(self) -> None:
        self.before().to(self.device)

    def training_step(self, batch: Batch) -> Tensor:
        text, pictures = batch
        with torch.no_grad():
            wanted = F.normalize(self.before()(self._images(pictures[:, 0])).float(), dim=-1)
        true, through, touched, drawn = self._embed(pictures)
        leads = torch.stack([true - through, through - touched, through - drawn])
        nearer = F.softplus(-self.scale * (leads * text).sum(dim=2)).mean(dim=1)
        moved = (2 - ((true + through) * wanted).sum(dim=1)).mean() / 2
        values = {"through": nearer[0], "touched": nearer[1], "drawn": nearer[2], "moved": moved}
        self.log_dict({name: value.detach() for name, value in values.items()}, batch_size=len(text))
        return nearer.sum() + HELD * moved

    def validation_step(self, batch: Batch) -> None:
        """The shares of captions nearer to their picture, sent through the VQGAN, than to it touched, and to what was
        drawn for them.
        """
        text, pictures = batch
        _, through, touched, drawn = self._embed(pictures)
        nearer = ((through - torch.stack([touched, drawn])) * text).sum(dim=2) > 0
        shares = nearer.float().mean(dim=1)
        self.log_dict({"val_touched": shares[0], "val_drawn": shares[1]}, batch_size=len(text))

    def _embed(self, pictures: Tensor) -> Tensor:
        """(B, 4, S, S, 3) uint8 -> (4, B, E), unit length."""
        embedded = self.visual(self._images(pictures.transpose(0, 1).flatten(0, 1))).float()
        return F.normalize(embedded, dim=-1).view(4, len(pictures), -1)

    def _images(self, pictures: Tensor) -> Tensor:
        images = for_clip(from_bytes(pictures), self.resolution)
        return images.contiguous(memory_format=torch.channels_last)  # a quarter faster on a CPU

    def configure_optimizers(self) -> dict[str, object]:
        return self.learning(adamw(self.visual, self.config, betas=(0.9, 0.98)))
