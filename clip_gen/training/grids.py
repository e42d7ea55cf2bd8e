"""Sample images during training: a PNG for each tenth of a stage, in the stage's folder under grids/."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from clip_gen.files import atomic_file
from clip_gen.images import from_bytes, to_pil
from clip_gen.networks.gpt import GPT
from clip_gen.networks.mixing import embed_prompt
from clip_gen.sampling.cuda_graphs import forget
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens
from clip_gen.training.datasets import EncodedPictures, PictureFiles
from clip_gen.training.stage import Stage
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

COLUMNS = 8
GAP = 2  # pixels between images
MIN_SIDE = 96  # pixels; smaller images are enlarged to about this


class Grids(Callback, ABC):
    """Draws `rows` on the first process, at each tenth of the steps or of the time limit and at the end.

    If drawing is slow some are left out: apart from the first and the last they take at most a twentieth of the time.
    """

    legend = ""  # describes the rows in the report

    def __init__(self, folder: Path):
        self.folder = folder / "grids"

    def on_train_start(self, trainer: pl.Trainer, module: Stage) -> None:
        self.tenths, self.draw_seconds, self.drawn_at = int(10 * module.fraction_done), 0.0, time.monotonic()

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
        self.folder.mkdir(exist_ok=True)
        with atomic_file(self.folder / f"{trainer.global_step:07d}.png", durable=False) as temporary:
            save_grid(rows, temporary, self.legend)
        self.drawn_at = time.monotonic()
        self.draw_seconds = self.drawn_at - began

    @abstractmethod
    def rows(self, module: Stage) -> list[list[Image.Image]]:
        """Rows of images of one size, made by the network as trained so far."""


class ReconstructionGrids(Grids):
    """Held-back pictures, above their reconstructions."""

    legend = "Pictures that were held back, above what the VQGAN makes of them."

    def __init__(self, held_back: PictureFiles, folder: Path):
        super().__init__(folder)
        self.pictures = held_back

    def rows(self, module: Stage) -> list[list[Image.Image]]:
        pixels = np.stack([self.pictures[i] for i in range(min(COLUMNS, len(self.pictures)))])
        images = from_bytes(torch.from_numpy(pixels)).to(module.device)
        return [to_pil(images), to_pil(module.vqgan.decode(module.vqgan.encode(images)))]


class SampleGrids(Grids):
    """Held-back pictures decoded from their tokens, images sampled from their embeddings, and a row for each prompt."""

    def __init__(self, networks: Networks, held_back: EncodedPictures, prompts: list[str], folder: Path, seed: int):
        super().__init__(folder)
        self.networks, self.pictures, self.prompts, self.seed = networks, held_back, prompts, seed
        rows = ["pictures that were held back, as their tokens have them", "what is drawn from their embeddings"]
        self.legend = f"From above: {'; '.join([*rows, *(f'“{prompt}”' for prompt in prompts)])}."

    def rows(self, module: Stage) -> list[list[Image.Image]]:
        count = min(COLUMNS, len(self.pictures))
        _, tokens, _, embeddings, _ = zip(*(self.pictures[i] for i in range(count)), strict=True)
        conditions = [torch.stack(embeddings).to(module.device)]
        if self.prompts:
            clip, bridge = self.networks.clip, self.networks.bridge.to(module.device)
            conditions += [embed_prompt(clip, bridge, prompt).expand(COLUMNS, -1) for prompt in self.prompts]
        try:
            rows = [torch.stack(tokens).to(module.device), *(self._sample(module.gpt, one) for one in conditions)]
        finally:
            forget(module.gpt)  # recorded CUDA graphs would keep their memory
        return [to_pil(self.networks.vqgan.decode(row)) for row in rows]

    def _sample(self, gpt: GPT, conditions: Tensor) -> Tensor:
        uniforms = candidate_uniforms(self.seed, range(len(conditions)), gpt.config.block_size)
        return sample_tokens(gpt, conditions, uniforms, Sampling())


def save_grid(rows: list[list[Image.Image]], path: str | Path, legend: str) -> None:
    """Saves rows of images of one size as a PNG, small ones enlarged by a whole factor.

    The legend is in the file, since a resumed training may have other prompts.
    """
    side = rows[0][0].width * max(1, round(MIN_SIDE / rows[0][0].width))
    width, height = (max(map(len, rows)) * (side + GAP) + GAP, len(rows) * (side + GAP) + GAP)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (GAP + x * (side + GAP), GAP + y * (side + GAP)))
    info = PngInfo()
    info.add_itxt("legend", legend)
    sheet.save(path, "png", pnginfo=info)
