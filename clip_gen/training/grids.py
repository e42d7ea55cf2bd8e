"""Sample images during training: a PNG before it and for each tenth of a stage, in the stage's folder under grids/."""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from clip_gen.files import atomic_file
from clip_gen.images import from_bytes, to_pil
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.gpt import GPT
from clip_gen.networks.mixing import embed_prompt
from clip_gen.prompts import parse_prompt, split_prompts
from clip_gen.sampling.cuda_graphs import forget
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens
from clip_gen.training.callbacks import append_history
from clip_gen.training.datasets import EncodedPictures, PictureFiles
from clip_gen.training.loggers import log_picture, log_values
from clip_gen.training.stage import Stage
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

COLUMNS = 8
GAP = 2  # pixels between images
MIN_SIDE = 96  # pixels; smaller images are enlarged to about this
MIN_RECOGNISED = 4  # pictures, to say something about


class Grids(Callback, ABC):
    """Draws `rows` on the first process: before the first step, at each tenth of the steps or of the time limit, and at
    the end.

    If drawing is slow some are left out: apart from the first two and the last they take at most a twentieth of the
    time.
    """

    labels: Sequence[str] = ()  # what each row shows

    def __init__(self, folder: Path):
        self.folder, self.history = folder / "grids", folder / "history.jsonl"
        self.values: dict[str, float] = {}  # measured on the last rows, for the history

    def on_train_start(self, trainer: pl.Trainer, module: Stage) -> None:
        self.tenths, self.draw_seconds, self.drawn_at = int(10 * module.fraction_done), 0.0, time.monotonic()
        if not trainer.global_step:
            self._draw(trainer, module)
            self.draw_seconds = 0.0  # the next one is due at the first tenth

    def on_train_batch_end(self, trainer: pl.Trainer, module: Stage, *_: object) -> None:
        tenths = int(10 * module.fraction_done)
        has_rested = time.monotonic() - self.drawn_at >= 19 * self.draw_seconds
        if self.tenths < tenths < 10 and trainer.global_step and has_rested:
            self.tenths = tenths
            self._draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Stage) -> None:
        self._draw(trainer, module)

    def _draw(self, trainer: pl.Trainer, module: Stage) -> None:
        if not trainer.is_global_zero:
            return
        began, training = time.monotonic(), module.training
        module.eval()
        try:
            # Compiling for these few would take longer than drawing them.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                rows = self.rows(module)
        except torch.OutOfMemoryError:  # it would end this process, but not the others
            log.warning("not enough memory for the sample images of step %d", trainer.global_step)
            return
        finally:
            module.train(training)
        step, path = trainer.global_step, self.folder / f"{trainer.global_step:07d}.png"
        self.folder.mkdir(exist_ok=True)
        with atomic_file(path, durable=False) as temporary:
            save_grid(rows, temporary, self.labels)
        log.info("samples of step %d: %s", step, path)
        log_picture(trainer.loggers, step, path)
        if self.values:
            append_history(self.history, step, self.values)
            log_values(trainer.loggers, step, self.values)
        self.drawn_at = time.monotonic()
        self.draw_seconds = self.drawn_at - began

    @abstractmethod
    def rows(self, module: Stage) -> list[list[Image.Image]]:
        """Rows of images of one size, made by the network as trained so far."""


class ReconstructionGrids(Grids):
    """Held-back pictures, above their reconstructions."""

    labels = ("held-back pictures", "what the VQGAN makes of them")

    def __init__(self, held_back: PictureFiles, folder: Path):
        super().__init__(folder)
        self.pictures = held_back

    def rows(self, module: Stage) -> list[list[Image.Image]]:
        pixels = np.stack([self.pictures[i] for i in range(min(COLUMNS, len(self.pictures)))])
        images = from_bytes(torch.from_numpy(pixels)).to(module.device)
        vqgan = module.vqgan
        # A new codebook has no codes yet, and would make them from these pictures.
        has_codes = vqgan.quantizer.has_codes
        tokens = vqgan.encode(images) if has_codes else images.new_zeros(len(images), vqgan.config.grid**2).long()
        return [to_pil(images), to_pil(vqgan.decode(tokens))]


class SampleGrids(Grids):
    """Held-back pictures decoded from their tokens, images sampled from their embeddings, and a row for each prompt."""

    def __init__(self, networks: Networks, held_back: EncodedPictures, prompts: list[str], folder: Path, seed: int):
        super().__init__(folder)
        self.networks, self.pictures, self.prompts, self.seed = networks, held_back, prompts, seed
        self.labels = ("held-back pictures, as their tokens have them", "what is drawn from their embeddings", *prompts)

    def rows(self, module: Stage) -> list[list[Image.Image]]:
        count = min(COLUMNS, len(self.pictures))
        _, tokens, _, embeddings, _ = zip(*(self.pictures[i] for i in range(count)), strict=True)
        embeddings = torch.stack(embeddings)
        conditions = [embeddings.to(module.device)]
        if self.prompts:
            clip, bridge = self.networks.clip, self.networks.bridge.to(module.device)
            conditions += [embed_prompt(clip, bridge, prompt).expand(COLUMNS, -1) for prompt in self.prompts]
        try:
            rows = [torch.stack(tokens).to(module.device), *(self._sample(module.gpt, one) for one in conditions)]
        finally:
            forget(module.gpt)  # recorded CUDA graphs would keep their memory
        images = [self.networks.vqgan.decode(row) for row in rows]
        self.values = {"recognised": self.recognised(images[1], embeddings)} if count >= MIN_RECOGNISED else {}
        return [to_pil(row) for row in images]

    def recognised(self, images: Tensor, embeddings: Tensor) -> float:
        """The share of images (B, 3, S, S) whose CLIP embedding is nearest to their own of the embeddings (B, E)."""
        device = next(self.networks.clip.parameters()).device
        found = self.networks.clip.encode_image(images.clamp(-1, 1).to(device)).cpu()
        nearest = (found.float() @ embeddings.cpu().float().T).argmax(dim=1)
        return float((nearest == torch.arange(len(images))).float().mean())

    def _sample(self, gpt: GPT, conditions: Tensor) -> Tensor:
        uniforms = candidate_uniforms(self.seed, range(len(conditions)), gpt.config.block_size)
        return sample_tokens(gpt, conditions, uniforms, Sampling())


def sample_prompts(text: str, clip: ClipEncoder) -> list[str]:
    """The prompts of the setting; warns of those that are longer than CLIP reads."""
    prompts = split_prompts(text)
    parts = [part for prompt in prompts for part in parse_prompt(prompt, "a sample prompt")]
    for part in parts if not rank_zero_only.rank else ():
        if lost := clip.tokenize.left_out(part.text):
            log.warning("a sample prompt is longer than CLIP reads; its end is left out: %r", lost)
    return prompts


def save_grid(rows: list[list[Image.Image]], path: str | Path, labels: Sequence[str]) -> None:
    """Saves rows of images of one size as a PNG, small ones enlarged by a whole factor.

    The labels of the rows are in the file, since a resumed training may have other prompts.
    """
    side = rows[0][0].width * max(1, round(MIN_SIDE / rows[0][0].width))
    width, height = (max(map(len, rows)) * (side + GAP) + GAP, len(rows) * (side + GAP) + GAP)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (GAP + x * (side + GAP), GAP + y * (side + GAP)))
    info = PngInfo()
    counts = [[label, len(row)] for label, row in zip(labels, rows, strict=True)]
    info.add_itxt("rows", json.dumps(counts, ensure_ascii=False))
    sheet.save(path, "png", pnginfo=info)


def read_grid(path: Path) -> list[tuple[str, list[Image.Image]]]:
    """The rows that save_grid wrote, each with its label; empty for a grid of an earlier version."""
    with Image.open(path) as sheet:
        counts = json.loads(sheet.text.get("rows", "[]"))
        cell = (sheet.height - GAP) // max(1, len(counts))  # with the gap
        return [
            (label, [sheet.crop(_square(x, y, cell)) for x in range(count)]) for y, (label, count) in enumerate(counts)
        ]


def _square(x: int, y: int, cell: int) -> tuple[int, int, int, int]:
    left, top = GAP + x * cell, GAP + y * cell
    return left, top, left + cell - GAP, top + cell - GAP
