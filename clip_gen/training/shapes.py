"""The recipe of the bundled model: CLIP on pairs, then both stages on pictures alone, then CLIP as a ranker, and last
the decoder on what it draws worst and the transformer on what prompts leave unsaid.

    python -m clip_gen train-shapes [--config configs/shapes.yaml] [--out checkpoints/shapes] [--work runs/shapes]

Each part is kept when done and skipped the next time; a part that was cut off goes on from its last checkpoint. A GPU
has room for two: one process with --parts vqgan decoder, another with --parts clip gpt bridge ranker vague, and each
waits for what the other trains.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from clip_gen.checkpoint import Networks, build, load_part, save_networks, save_part
from clip_gen.config import ModelConfig, read_config
from clip_gen.files import whole_or_not
from clip_gen.images import from_bytes
from clip_gen.machine import at_work
from clip_gen.shapes.captions import caption, describe
from clip_gen.shapes.pairs import CaptionedPairs, HardPictures, NearMisses, RenderedPictures
from clip_gen.shapes.scenes import HELD_OUT, sample_scene
from clip_gen.training.clip_trainer import ClipTrainer, Collate
from clip_gen.training.dataset import (
    EncodedPictures,
    Endless,
    encode_embeddings,
    encode_tokens,
    find_neighbours,
    prepared,
    wait_for,
)
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.ranker import RankedPictures, RankerTrainer, ranked_pictures
from clip_gen.training.run import Machine, fit
from clip_gen.training.stage import FitConfig, compiled
from clip_gen.training.vqgan_trainer import VQGANTrainer

log = logging.getLogger(__name__)

# Streams of pictures that never meet: each is a seed of its own.
PAIRS, PICTURES, ENCODED, UNSEEN, RANKED = STREAMS = range(5)

ORDER = ("clip", "vqgan", "gpt", "bridge", "ranker", "decoder", "vague")
NETWORK = {"ranker": "clip", "decoder": "vqgan", "vague": "gpt"}  # that a part goes on with
RESTS_ON = {
    "gpt": ("clip", "vqgan"),
    "bridge": ("clip",),
    "ranker": ("clip", "vqgan", "gpt"),
    "decoder": ("vqgan",),
    "vague": ("clip", "vqgan", "gpt"),
}
# The work that processes share; the rest is the first one's, and the others wait.
SHARED = ("vqgan", "gpt", "decoder", "vague")


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
    contrast: float = 0.0
    ranker_fit: FitConfig = field(default_factory=FitConfig)
    drawn_pictures: int = 8000
    decoder_fit: FitConfig = field(default_factory=FitConfig)
    vague_fit: FitConfig = field(default_factory=FitConfig)
    condition_blur: float = 0.25


class Recipe:
    """The parts in order, each resting on the ones before."""

    def __init__(self, config: ShapesConfig, work: Path, machine: Machine | None = None):
        pl.seed_everything(config.seed)
        self.config, self.work, self.machine = config, work, machine or Machine()
        self.networks: Networks = build(config.model)

    def stream(self, number: int) -> int:
        return len(STREAMS) * self.config.seed + number

    def part(self, name: str) -> None:
        """Loads the part from the work folder, or trains it and leaves it there."""
        folder = self.work / name
        network, told = getattr(self.networks, NETWORK.get(name, name)), self.told(name)
        record = folder / "record.json"
        if not record.is_file() and (name in SHARED or not rank_zero_only.rank):
            folder.mkdir(parents=True, exist_ok=True)
            pl.seed_everything(self.config.seed)
            values = getattr(self, f"train_{name}")(folder)
            if not rank_zero_only.rank:
                save_part(network, folder / f"{name}.safetensors")
                with whole_or_not(record) as temporary:
                    Path(temporary).write_text(json.dumps(values | {"told": told}))
        wait_for(record)
        if json.loads(record.read_text())["told"] != told:
            raise ValueError(f"{folder} was trained by another recipe; remove it, or name another --work folder")
        # Loaded even when just trained, so that what comes next sees the weights as they will ship: float16.
        load_part(network, folder / f"{name}.safetensors")
        network.eval().requires_grad_(False)

    def told(self, name: str) -> dict[str, object]:
        """All that decides what a part turns into, as JSON has it."""
        settings: dict[str, object] = {"seed": self.config.seed}
        if name in ("clip", "vqgan", "gpt"):
            settings["sizes"] = stated(getattr(self.config.model, name))
        if name != "bridge":
            settings["fit"] = stated(getattr(self.config, f"{name}_fit"))
        if name in ("gpt", "vague"):
            names = ("encoded_pictures", "embedding_noise", "condition_dropout", "contrast")
            settings |= {name: getattr(self.config, name) for name in names}
        if name == "vague":
            settings["condition_blur"] = self.config.condition_blur
        if name == "ranker":
            settings["drawn_pictures"] = self.config.drawn_pictures
        settings |= {part: fingerprint(self.work / part / f"{part}.safetensors") for part in RESTS_ON.get(name, ())}
        return json.loads(json.dumps(settings))

    def train_clip(self, folder: Path) -> dict[str, object]:
        config, clip = self.config.clip_fit, self.config.model.clip
        trainer = ClipTrainer(self.networks.clip, config)

        def groups(count: int, stream: int) -> CaptionedPairs:
            return CaptionedPairs(count, self.stream(stream), clip.image_resolution)

        seen, unseen = groups(config.steps * config.batch_size, PAIRS), groups(512, UNSEEN)
        collate = Collate(clip.context_length)
        # On one process whatever the machine: a batch shared out would have fewer wrong answers to each question.
        alone = replace(self.machine, devices="1", nodes=1)
        record = fit("clip", trainer, seen, unseen, folder, seed=self.config.seed, machine=alone, collate=collate)
        trainer.forget_unseen_words()
        return record

    def train_vqgan(self, folder: Path) -> dict[str, object]:
        config = self.config.vqgan_fit
        trainer = VQGANTrainer(self.networks.vqgan.train(), config)
        seen, unseen = self.pictures(config.steps * config.batch_size, PICTURES), self.pictures(512, UNSEEN)
        return fit("vqgan", trainer, seen, unseen, folder, seed=self.config.seed, machine=self.machine)

    def train_gpt(self, folder: Path) -> dict[str, object]:
        return self.fit_gpt("gpt", folder, self.config.gpt_fit, self.encoded("train"), self.config.seed)

    def train_vague(self, folder: Path) -> dict[str, object]:
        """The transformer goes on, some of its conditions being what many pictures have in common."""
        clip = self.networks.clip
        load_part(clip, self.work / "clip" / "clip.safetensors")  # the ranker's embeddings are not quite the same
        seen = self.encoded("train", blur=self.config.condition_blur)
        values = self.fit_gpt("vague", folder, self.config.vague_fit, seen, self.config.seed + 1)
        load_part(clip, self.work / "ranker" / "ranker.safetensors")
        return values

    def fit_gpt(
        self, name: str, folder: Path, config: FitConfig, seen: EncodedPictures, seed: int
    ) -> dict[str, object]:
        gpt = self.networks.gpt.train().requires_grad_(True)
        trainer, unseen = GPTTrainer(gpt, config, contrast=self.config.contrast), self.encoded("unseen")
        return fit(name, trainer, Endless(seen, seed), unseen, folder, seed=seed, machine=self.machine)

    def train_decoder(self, folder: Path) -> dict[str, object]:
        """The VQGAN's decoder goes on alone: every picture keeps its tokens."""
        config, resolution = self.config.decoder_fit, self.config.model.vqgan.resolution
        trainer = VQGANTrainer(self.networks.vqgan.train(), config, decoder_alone=True)
        seen = HardPictures(config.steps * config.batch_size, self.stream(PICTURES), resolution)
        unseen = self.pictures(512, UNSEEN)
        return fit("decoder", trainer, seen, unseen, folder, seed=self.config.seed, machine=self.machine)

    def encoded(self, name: str, blur: float = 0.0) -> EncodedPictures:
        """The pictures the transformer trains on, or those its loss is watched on, through CLIP and VQGAN."""
        folder = self.work / "encoded"
        stream, count = {"train": (ENCODED, self.config.encoded_pictures), "unseen": (UNSEEN, 1024)}[name]
        pictures, networks, missed, neighbours = self.pictures(count, stream), self.networks, None, None
        if self.config.gpt_fit.compile:
            compiled(networks.clip.clip.visual)
            compiled(networks.vqgan.encoder, dynamic=networks.vqgan.config.local)
        if self.config.contrast and name == "train":
            near_misses = NearMisses(count, self.stream(stream), self.config.model.vqgan.resolution)
            missed = encode_embeddings(near_misses, networks.clip, folder / self.array_name("clip", "missed", count))
        embeddings = encode_embeddings(pictures, networks.clip, folder / self.array_name("clip", name, count))
        if blur:
            path = folder / self.array_name("clip", "neighbours", count)
            neighbours = find_neighbours(embeddings, 0, path, self.config.seed)
        return EncodedPictures(
            embeddings,
            encode_tokens(pictures, networks.vqgan, folder / self.array_name("vqgan", name, count)),
            noise=self.config.embedding_noise,
            dropout=self.config.condition_dropout,
            near_misses=missed,
            neighbours=neighbours,
            blur=blur,
        )

    def array_name(self, part: str, name: str, count: int) -> str:
        """An array is of use only to the network that made it."""
        return f"{part}-{fingerprint(self.work / part / f'{part}.safetensors')}-{name}-{count}.npy"

    @torch.no_grad()
    def train_bridge(self, folder: Path) -> dict[str, object]:
        """The mean of each side, over 4,000 pictures of the generator's and the captions of 4,000 other scenes."""
        bridge, clip = self.networks.bridge, self.networks.clip
        loader = prepared(self.pictures(4000, PICTURES), batch_size=64)
        scenes = (sample_scene(np.random.default_rng([self.stream(UNSEEN), i])) for i in range(4000))
        with at_work(clip) as device:
            image = torch.cat([clip.encode_image(from_bytes(batch.to(device))) for batch in loader]).mean(dim=0).cpu()
            text = clip.encode_text([caption(describe(scene)) for scene in scenes]).mean(dim=0).cpu()
        bridge.image_mean.copy_(image)
        bridge.text_mean.copy_(text)
        return {"gap": round(float((image - text).norm()), 4)}

    def train_ranker(self, folder: Path) -> dict[str, object]:
        networks, config = self.networks, self.config.ranker_fit

        def ranked(name: str, count: int, stream: int) -> RankedPictures:
            pairs = CaptionedPairs(count, self.stream(stream), networks.config.vqgan.resolution)
            return ranked_pictures(networks, pairs, self.stream(stream), folder, name)

        seen, unseen = ranked("drawn", self.config.drawn_pictures, RANKED), ranked("unseen", 512, UNSEEN)
        trainer, alone = RankerTrainer(networks.clip, config), replace(self.machine, devices="1", nodes=1)
        return fit("ranker", trainer, seen, unseen, folder, seed=self.config.seed, machine=alone)

    def pictures(self, count: int, stream: int) -> RenderedPictures:
        return RenderedPictures(count, self.stream(stream), self.config.model.vqgan.resolution)

    def training_record(self) -> dict[str, object]:
        return {
            "data": "shapes: rendered pictures; the VQGAN and the transformer saw no caption and no held-out pair",
            "held_out": sorted(" ".join(pair) for pair in HELD_OUT),
            "stages": {name: json.loads((self.work / name / "record.json").read_text()) for name in ORDER},
            "config": asdict(self.config),
            "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
            "python": platform.python_version(),
        }


def stated(config: object) -> dict[str, object]:
    """The fields that differ from their defaults: a setting that is new since then does not make another recipe."""
    values = {spec.name: (getattr(config, spec.name), spec.default) for spec in fields(config)}
    return {name: value for name, (value, default) in values.items() if value != default}


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("configs/shapes.yaml"))
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="checkpoints and encoded pictures")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="where the model folder goes")
    parser.add_argument("--devices", default="auto", help="GPUs or, on a CPU, processes that share the work")
    words = "those to train; others that they rest on another process trains in the same --work folder"
    parser.add_argument("--parts", nargs="+", choices=ORDER, default=list(ORDER), help=f"{words}; all by default")


def main(arguments: argparse.Namespace) -> None:
    recipe = Recipe(read_config(arguments.config, ShapesConfig), arguments.work, Machine(arguments.devices))
    for name in parts_in_order(arguments.parts):
        while name not in arguments.parts and not (arguments.work / name / "record.json").is_file():
            time.sleep(0.5)
        recipe.part(name)
    if ORDER[-1] in arguments.parts and not rank_zero_only.rank:
        save_networks(recipe.networks, arguments.out, recipe.training_record())


def parts_in_order(wanted: Collection[str]) -> list[str]:
    """These and what they rest on; with the last one, whose model is whole, all."""
    if ORDER[-1] in wanted:
        return list(ORDER)
    needed = {*wanted, *(below for name in wanted for below in RESTS_ON.get(name, ()))}
    return [name for name in ORDER if name in needed]
