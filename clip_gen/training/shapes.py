"""The recipe of the bundled model: CLIP on pairs, then both stages on pictures alone.

    python -m clip_gen.training.shapes [--config configs/shapes.yaml] [--out checkpoints/shapes] [--work runs/shapes]

Each part is kept when done and skipped the next time; a part that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from clip_gen.checkpoint import Networks, build, load_part, save_networks, save_part
from clip_gen.config import ModelConfig, read_config
from clip_gen.images import from_bytes
from clip_gen.shapes.captions import caption, describe
from clip_gen.shapes.pairs import CaptionedPairs, RenderedPictures
from clip_gen.shapes.scenes import HELD_OUT, sample_scene
from clip_gen.training.clip_trainer import ClipTrainer, Collate
from clip_gen.training.dataset import EncodedPictures, encode_embeddings, encode_tokens
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.run import FitConfig, fit
from clip_gen.training.vqgan_trainer import VQGANTrainer

log = logging.getLogger(__name__)

# Streams of pictures that never meet: each is a seed of its own.
PAIRS, PICTURES, ENCODED, UNSEEN = range(4)


@dataclass(frozen=True)
class ShapesConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 0
    clip_fit: FitConfig = field(default_factory=FitConfig)
    vqgan_fit: FitConfig = field(default_factory=FitConfig)
    gpt_fit: FitConfig = field(default_factory=FitConfig)
    encoded_pictures: int = 100_000
    embedding_noise: float = 0.5
    condition_dropout: float = 0.1


class Recipe:
    """The three parts in order, each resting on the ones before."""

    def __init__(self, config: ShapesConfig, work: Path):
        pl.seed_everything(config.seed)
        self.config, self.work = config, work
        self.networks: Networks = build(config.model)

    def stream(self, number: int) -> int:
        return 4 * self.config.seed + number

    def part(self, name: str) -> None:
        """Loads the part from the work folder, or trains it and leaves it there."""
        folder = self.work / name
        network = getattr(self.networks, name)
        if not (folder / "record.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            pl.seed_everything(self.config.seed)
            record = getattr(self, f"train_{name}")(folder)
            save_part(network, folder / f"{name}.safetensors")
            (folder / "record.json").write_text(json.dumps(record))
        # Loaded even when just trained, so that what comes next sees the weights as they will ship: float16.
        load_part(network, folder / f"{name}.safetensors")
        network.eval().requires_grad_(False)

    def train_clip(self, folder: Path) -> dict[str, object]:
        config, clip = self.config.clip_fit, self.config.model.clip
        if config.compile:
            self.networks.clip.clip.visual.compile()
            self.networks.clip.clip.transformer.compile()
        trainer = ClipTrainer(self.networks.clip, **_learning(config))
        collate = Collate(clip.context_length)

        def loader(groups: int, stream: int) -> DataLoader:
            pairs = CaptionedPairs(groups, self.stream(stream), clip.image_resolution)
            return DataLoader(pairs, config.batch_size, num_workers=1, collate_fn=collate)

        record = fit(
            "clip", trainer, config, loader(config.steps * config.batch_size, PAIRS), loader(512, UNSEEN), folder
        )
        trainer.forget_unseen_words()
        return record

    def train_vqgan(self, folder: Path) -> dict[str, object]:
        config, vqgan = self.config.vqgan_fit, self.networks.vqgan
        if config.compile:
            vqgan.encoder.compile()
            vqgan.decoder.compile()
        trainer = VQGANTrainer(vqgan.to(memory_format=torch.channels_last).train(), **_learning(config))
        pictures = self.pictures(config.steps * config.batch_size, PICTURES)
        record = fit(
            "vqgan",
            trainer,
            config,
            DataLoader(pictures, config.batch_size, num_workers=1),
            DataLoader(self.pictures(512, UNSEEN), config.batch_size),
            folder,
        )
        vqgan.to(memory_format=torch.contiguous_format)
        return record

    def train_gpt(self, folder: Path) -> dict[str, object]:
        config, gpt = self.config.gpt_fit, self.networks.gpt
        train, unseen = self.encoded("train"), self.encoded("unseen")
        if config.compile:
            gpt.compile()
        trainer = GPTTrainer(
            gpt.train().requires_grad_(True),
            embedding_noise=self.config.embedding_noise,
            condition_dropout=self.config.condition_dropout,
            **_learning(config),
        )
        loaders = (
            DataLoader(train, config.batch_size, shuffle=True, drop_last=True),
            DataLoader(unseen, config.batch_size),
        )
        return fit("gpt", trainer, config, *loaders, folder)

    def encoded(self, name: str) -> EncodedPictures:
        """The pictures the transformer trains on, or those its loss is watched on, through CLIP and VQGAN."""
        folder = self.work / "encoded" / name
        stream, count = {"train": (ENCODED, self.config.encoded_pictures), "unseen": (UNSEEN, 1024)}[name]
        pictures, networks = self.pictures(count, stream), self.networks
        if self.config.gpt_fit.compile:
            networks.clip.clip.visual.compile()
            networks.vqgan.encoder.compile()
        return EncodedPictures(
            encode_embeddings(pictures, networks.clip, folder / "embeddings.npy"),
            encode_tokens(pictures, networks.vqgan, folder / "tokens.npy"),
        )

    @torch.no_grad()
    def train_bridge(self, folder: Path) -> dict[str, object]:
        """The mean of each side, over 4,000 pictures of the generator's and the captions of 4,000 other scenes."""
        bridge, clip = self.networks.bridge, self.networks.clip
        loader = DataLoader(self.pictures(4000, PICTURES), 64)
        image = torch.cat([clip.encode_image(from_bytes(batch)) for batch in loader]).mean(dim=0)
        scenes = (sample_scene(np.random.default_rng([self.stream(UNSEEN), i])) for i in range(4000))
        text = clip.encode_text([caption(describe(scene)) for scene in scenes]).mean(dim=0)
        bridge.image_mean.copy_(image)
        bridge.text_mean.copy_(text)
        return {"gap": round(float((image - text).norm()), 4)}

    def pictures(self, count: int, stream: int) -> RenderedPictures:
        return RenderedPictures(count, self.stream(stream), self.config.model.vqgan.resolution)

    def training_record(self) -> dict[str, object]:
        parts = ("clip", "vqgan", "gpt", "bridge")
        return {
            "data": "shapes: rendered pictures; the VQGAN and the transformer saw no caption and no held-out pair",
            "held_out": sorted(" ".join(pair) for pair in HELD_OUT),
            "stages": {name: json.loads((self.work / name / "record.json").read_text()) for name in parts},
            "config": asdict(self.config),
            "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
            "python": platform.python_version(),
        }


def _learning(config: FitConfig) -> dict[str, float]:
    return {name: getattr(config, name) for name in ("steps", "learning_rate", "warmup", "weight_decay")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the bundled model.")
    parser.add_argument("--config", type=Path, default=Path("configs/shapes.yaml"))
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="checkpoints and encoded pictures")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="where the model folder goes")
    parser.add_argument("--parts", nargs="+", default=["clip", "vqgan", "gpt", "bridge"], help="train only these")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = Recipe(read_config(arguments.config, ShapesConfig), arguments.work)
    for name in arguments.parts:
        recipe.part(name)
    if set(arguments.parts) >= {"clip", "vqgan", "gpt", "bridge"}:
        save_networks(recipe.networks, arguments.out, recipe.training_record())


if __name__ == "__main__":
    main()
