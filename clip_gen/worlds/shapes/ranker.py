"""CLIP's image tower learns what the generator's pictures look like, so as to rank them. Nothing else changes.

A caption is to be nearer to the picture it tells of than to one that the generator drew for it, as a GAN's
discriminator tells the two apart: where the drawn picture is as good the two cancel out, and what is left is what goes
wrong in drawing. And nearer than to the same picture with some tokens written anew, which has dents and crumbs and
differs in nothing else. A shorter caption of the picture is to be nearer too: more of what is drawn is true of it, and
how well it is drawn is what is left to tell. All three pictures come out of the VQGAN, so that its marks give nothing
away; how much they spoil a picture is learnt apart, from the one before it went in.

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

from clip_gen.hardware import choose_dtype, on_device
from clip_gen.images import for_clip, from_bytes, to_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, draw, sample_tokens
from clip_gen.training.encoding import new_array
from clip_gen.training.loading import loader_with_workers
from clip_gen.training.stage import FitConfig, Stage, adamw, compiled
from clip_gen.weights.model_folder import Networks
from clip_gen.worlds.shapes.pairs import CaptionedPairs

log = logging.getLogger(__name__)

TOGETHER = 128  # pictures made in one batch
KEPT = 32 * TOGETHER  # captions whose pictures are kept in one file, so that drawing cut off goes on from the last
TEMPERATURES = (1.0, 1.1, 1.2, 1.3)  # of the batches in turn: wilder pictures show more of what can go wrong
TOUCHED = (0.1, 0.3, 0.6, 1.0)  # shares of a picture's tokens that are written anew
HELD = 6.0  # weight of holding true pictures in place

Batch = tuple[Tensor, Tensor]


class RankedPictures(Dataset):
    """The embeddings of caption n and of a shorter one (2, E) float32, and four pictures (4, S, S, 3) uint8: its own as
    it is and through the VQGAN, the same with some tokens written anew, and one drawn for the caption. Without end:
    every other time they are mirrored, all four of them, so that left and right are as wrong in one as in the next.
    """

    def __init__(self, parts: list[tuple[Path, Path]]):
        """parts: .npy files of embeddings (KEPT, 2, E) and pictures (KEPT, 4, S, S, 3); the last may have fewer."""
        self.texts = np.concatenate([np.load(texts) for texts, _ in parts])
        self.pictures = [np.load(pictures, mmap_mode="r") for _, pictures in parts]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        time, row = divmod(number, len(self))
        pictures = self.pictures[row // KEPT][row % KEPT]
        return self.texts[row], (pictures[:, :, ::-1] if time % 2 else pictures).copy()


def ranked_pictures(networks: Networks, pairs: CaptionedPairs, seed: int, folder: Path, name: str) -> RankedPictures:
    """Made for the first caption of each group, which may leave things out; what the folder has already is kept."""
    parts = []
    for start in range(0, len(pairs), KEPT):
        texts, pictures = (folder / f"{name}-{what}-{start // KEPT:03d}.npy" for what in ("texts", "pictures"))
        if not pictures.is_file():
            _make(networks, pairs, range(start, min(start + KEPT, len(pairs))), seed, texts, pictures)
        parts.append((texts, pictures))
    return RankedPictures(parts)


class Firsts(Dataset):
    """The pictures that groups begin with, and two captions of each."""

    def __init__(self, pairs: CaptionedPairs, numbers: range):
        self.pairs, self.numbers = pairs, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[str, str]]:
        return self.pairs.first(self.numbers[index])


@torch.inference_mode()
def _make(networks: Networks, pairs: CaptionedPairs, numbers: range, seed: int, texts: Path, pictures: Path) -> None:
    config, gpt = networks.config, deepcopy(networks.gpt)
    side, length = config.vqgan.resolution, config.gpt.block_size
    loader = loader_with_workers(Firsts(pairs, numbers), batch_size=TOGETHER, collate_fn=list)
    with (
        on_device(gpt, networks.clip, networks.vqgan, networks.bridge) as device,
        new_array(pictures, (len(numbers), 4, side, side, 3), np.uint8) as shown,  # last, and so when both are whole
        new_array(texts, (len(numbers), 2, config.clip.embed_dim), np.float32) as rows,
    ):
        gpt.cast_for_inference(choose_dtype("auto", device))
        for start, firsts in zip(range(0, len(numbers), TOGETHER), loader, strict=True):
            indices = numbers[start : start + TOGETHER]
            turn, here = indices[0] // TOGETHER, slice(start, start + len(indices))
            shows, told = zip(*firsts, strict=True)
            true = torch.from_numpy(np.stack(shows))
            text = torch.stack([networks.clip.encode_text(captions) for captions in zip(*told, strict=True)], dim=1)
            condition, tokens = networks.bridge(text[:, 0]), networks.vqgan.encode(from_bytes(true.to(device)))
            sampling = Sampling(temperature=TEMPERATURES[turn % len(TEMPERATURES)])
            drawn = sample_tokens(gpt, condition, candidate_uniforms(seed, indices, length), sampling)
            touched = written_anew(gpt, condition, tokens, np.random.default_rng([seed, turn]))
            rows[here] = text.cpu().numpy()
            shown[here, 0] = true.numpy()
            for place, made in enumerate((tokens, touched, drawn), start=1):
                shown[here, place] = to_bytes(networks.vqgan.decode(made)).cpu().numpy()
            log.info("%s: drawn for %d captions", pictures.name, here.stop)


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
        nearer = F.softplus(-self.scale * (leads[:, :, None] * text).sum(dim=3)).mean(dim=(1, 2))
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
        nearer = ((through - torch.stack([touched, drawn])) * text[:, 0]).sum(dim=2) > 0
        shares = nearer.float().mean(dim=1)
        self.log_dict({"val_touched": shares[0], "val_drawn": shares[1]}, batch_size=len(text))

    def _embed(self, pictures: Tensor) -> Tensor:
        """(B, 4, S, S, 3) uint8 -> (4, B, E), unit length."""
        embedded = self.visual(self._images(pictures.transpose(0, 1).flatten(0, 1))).float()
        return F.normalize(embedded, dim=-1).view(4, len(pictures), -1)

    def _images(self, pictures: Tensor) -> Tensor:
        images = for_clip(from_bytes(pictures), self.resolution)
        if images.device.type == "cpu":  # a quarter faster there
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def configure_optimizers(self) -> dict[str, object]:
        return self.learning(adamw(self.visual, self.config, betas=(0.9, 0.98)))
