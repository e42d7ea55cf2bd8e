"""The command `train-shapes`: trains the bundled model from nothing, part by part.

    python -m clip_gen train-shapes [--config RECIPE.yaml] [--out checkpoints/shapes] [--work runs/shapes]

CLIP trains on pairs of pictures and captions; the VQGAN and the transformer on pictures only; the bridge gets the mean
embeddings; and at last CLIP's image tower is trained to rank. The work folder keeps every finished part, and an
interrupted part resumes from its last checkpoint. With --parts several processes train different parts in one work
folder at the same time and wait for each other, as in script/train-shapes.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

import clip_gen
from clip_gen.config import ModelConfig, read_config
from clip_gen.files import claim_folder, folder_lock
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.training.datasets import EncodedPictures, Endless, enough_places
from clip_gen.training.encoding import encode_once, find_neighbours
from clip_gen.training.fit import Machine, fit
from clip_gen.training.gpt_trainer import GPTTrainer, start_from_codes
from clip_gen.training.loading import loader_with_workers
from clip_gen.training.processes import wait_for
from clip_gen.training.stage import FitConfig, compiled
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.model_folder import Networks, build, check_model_folder, load_part, save_networks, save_part
from clip_gen.worlds.shapes.captions import caption, describe
from clip_gen.worlds.shapes.clip_trainer import ClipTrainer, Collate
from clip_gen.worlds.shapes.pairs import CaptionedPairs, HardPictures, NearMisses, RenderedPictures
from clip_gen.worlds.shapes.ranker import RankedPictures, RankerTrainer, ranked_pictures
from clip_gen.worlds.shapes.scenes import HELD_OUT, sample_scene
from clip_gen.worlds.shapes.work_folder import (
    PARTS,
    RECORD,
    SETTINGS,
    changed_fields,
    fingerprint,
    has_parts,
    may_resume,
    write_json,
)

log = logging.getLogger(__name__)

CONFIG = Path(clip_gen.__file__).parent / "configs" / "shapes.yaml"

# Streams of pictures with different seeds, so that they have no picture in common.
PAIRS, PICTURES, ENCODED, UNSEEN, RANKED = STREAMS = range(5)

NEEDS = {"gpt": ("clip", "vqgan"), "bridge": ("clip",), "ranker": ("clip", "vqgan", "gpt")}
SHARED = ("vqgan", "gpt")  # trained by all processes; the first process alone trains the others


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
    condition_blur: float = 0.25
    contrast: float = 0.0
    ranker_fit: FitConfig = field(default_factory=FitConfig)
    drawn_pictures: int = 8000


class Recipe:
    """Trains the parts in a work folder."""

    def __init__(self, config: ShapesConfig, work: Path, machine: Machine | None = None):
        pl.seed_everything(config.seed)
        self.config, self.work, self.machine = config, work, machine or Machine()
        self.networks: Networks = build(config.model)

    def stream(self, number: int) -> int:
        """The seed of a stream of pictures."""
        return len(STREAMS) * self.config.seed + number

    def load_or_train(self, name: str) -> None:
        """Loads a part from the work folder, or trains it and saves it there."""
        folder, settings = self.work / name, self.settings(name)
        record, first = folder / RECORD, not rank_zero_only.rank
        other = f"{folder} was trained by another recipe; remove it, or name another --work folder"
        if not record.is_file() and (name in SHARED or first):
            busy = f"{folder} is in use by another training; wait for it to end, or name another --work folder"
            with folder_lock(folder, busy) if first else nullcontext():
                if first and not may_resume(folder / SETTINGS, settings):
                    raise ValueError(other)
                pl.seed_everything(self.config.seed)
                values = self.train(name, folder)
                if first:
                    save_part(self.network(name), self.weights(name))
                    self.load(name)
                    self.encode(name)  # before the record, which other processes wait for
                    write_json(record, values | {"told": settings})
        wait_for(record)
        if json.loads(record.read_text())["told"] != settings:
            raise ValueError(other)
        self.load(name)

    def train(self, name: str, folder: Path) -> dict[str, object]:
        """Trains one part; returns what to record about it."""
        if name == "bridge":
            return self.train_bridge()
        by_name = {"clip": self.train_clip, "vqgan": self.train_vqgan, "gpt": self.train_gpt}
        return by_name.get(name, self.train_ranker)(folder)

    def network(self, name: str) -> nn.Module:
        """The network that a part trains."""
        networks = self.networks
        return {"vqgan": networks.vqgan, "gpt": networks.gpt, "bridge": networks.bridge}.get(name, networks.clip)

    def weights(self, name: str) -> Path:
        return self.work / name / f"{name}.safetensors"

    def load(self, name: str) -> None:
        """Loads a part, even if it was just trained: the next parts must see its weights in float16, as published."""
        network = self.network(name)
        load_part(network, self.weights(name))
        network.eval().requires_grad_(False)

    def settings(self, name: str) -> dict[str, object]:
        """Everything that determines a part's weights, as JSON values."""
        config, sizes = self.config, self.config.model
        settings: dict[str, object] = {"seed": config.seed}
        match name:
            case "clip":
                settings |= {"sizes": changed_fields(sizes.clip), "fit": changed_fields(config.clip_fit)}
            case "vqgan":
                settings |= {"sizes": changed_fields(sizes.vqgan), "fit": changed_fields(config.vqgan_fit)}
            case "gpt":
                settings |= {"sizes": changed_fields(sizes.gpt), "fit": changed_fields(config.gpt_fit)}
                settings |= {"encoded_pictures": config.encoded_pictures, "embedding_noise": config.embedding_noise}
                settings |= {"condition_dropout": config.condition_dropout, "condition_blur": config.condition_blur}
                settings["contrast"] = config.contrast
            case "ranker":
                settings |= {"fit": changed_fields(config.ranker_fit), "drawn_pictures": config.drawn_pictures}
        settings |= {part: fingerprint(self.weights(part)) for part in NEEDS.get(name, ())}
        return json.loads(json.dumps(settings))

    def train_clip(self, folder: Path) -> dict[str, object]:
        config, clip = self.config.clip_fit, self.config.model.clip
        trainer = ClipTrainer(self.networks.clip, config)

        def groups(count: int, stream: int) -> CaptionedPairs:
            return CaptionedPairs(count, self.stream(stream), clip.image_resolution)

        seen, unseen = groups(config.steps * config.batch_size, PAIRS), groups(512, UNSEEN)
        collate = Collate(clip.context_length)
        # In one process: if processes shared a batch, each caption would have fewer wrong pictures to compare with.
        alone = replace(self.machine, devices="1", nodes=1)
        record = fit("clip", trainer, seen, unseen, folder, seed=self.config.seed, machine=alone, collate=collate)
        trainer.clear_unseen_words()
        return record

    def train_vqgan(self, folder: Path) -> dict[str, object]:
        config = self.config.vqgan_fit
        trainer = VQGANTrainer(self.networks.vqgan.train(), config)
        resolution = self.config.model.vqgan.resolution
        seen = HardPictures(config.steps * config.batch_size, self.stream(PICTURES), resolution)
        unseen = self.pictures(512, UNSEEN)
        return fit("vqgan", trainer, seen, unseen, folder, seed=self.config.seed, machine=self.machine)

    def train_gpt(self, folder: Path) -> dict[str, object]:
        config, seed, networks = self.config.gpt_fit, self.config.seed, self.networks
        seen, unseen = self.encoded("train"), self.encoded("unseen")
        start_from_codes(networks.gpt, networks.vqgan, seed)
        trainer = GPTTrainer(networks.gpt.train().requires_grad_(True), config, contrast=self.config.contrast)
        return fit("gpt", trainer, Endless(seen, seed), unseen, folder, seed=seed, machine=self.machine)

    def encoded(self, name: str) -> EncodedPictures:
        """The pictures that the transformer trains on ("train") or is validated on ("unseen")."""
        embeddings, tokens = self.embeddings(name), self.tokens(name)
        missed, neighbours = None, None
        if self.config.contrast and name == "train":
            missed = self.embeddings("missed")
        if self.config.condition_blur and name == "train":
            path = embeddings.with_name(embeddings.name.replace(name, "neighbours"))
            neighbours = find_neighbours(embeddings, 0, path, self.config.seed)
        return EncodedPictures(
            embeddings,
            tokens,
            noise=self.config.embedding_noise,
            dropout=self.config.condition_dropout,
            near_misses=missed,
            neighbours=neighbours,
            blur=self.config.condition_blur,
            places=enough_places(np.load(tokens, mmap_mode="r")),
        )

    def encode(self, part: str) -> None:
        """Encodes the transformer's pictures by a new network, while another process may train the other network."""
        for name in ("train", "unseen"):
            if part == "clip":
                self.embeddings(name)
            elif part == "vqgan":
                self.tokens(name)
        if part == "clip" and self.config.contrast:
            self.embeddings("missed")

    def embeddings(self, name: str) -> Path:
        """CLIP's embeddings of the pictures "train" or "unseen", or "missed" (near misses of "train"); a .npy file."""
        if self.config.gpt_fit.compile:
            compiled(self.networks.clip.clip.visual)
        return self.encode_once("clip", name)

    def tokens(self, name: str) -> Path:
        """The VQGAN's tokens of the pictures "train" or "unseen"; a .npy file."""
        vqgan = self.networks.vqgan
        if self.config.gpt_fit.compile:
            compiled(vqgan.encoder, dynamic=vqgan.config.local)
        return self.encode_once("vqgan", name)

    def encode_once(self, part: str, name: str) -> Path:
        """The file name has the network's fingerprint, since another network would encode otherwise."""
        pictures, network = self.to_encode(name), fingerprint(self.weights(part))
        path = self.work / "encoded" / f"{part}-{network}-{name}-{len(pictures)}.npy"
        encode_once(pictures, {path: self.network(part)})
        return path

    def to_encode(self, name: str) -> RenderedPictures:
        resolution = self.config.model.vqgan.resolution
        if name == "unseen":
            return RenderedPictures(1024, self.stream(UNSEEN), resolution)
        kind = NearMisses if name == "missed" else RenderedPictures
        return kind(self.config.encoded_pictures, self.stream(ENCODED), resolution)

    @torch.no_grad()
    def train_bridge(self) -> dict[str, object]:
        """The mean embeddings of 4,000 pictures and of the captions of 4,000 other scenes."""
        bridge, clip = self.networks.bridge, self.networks.clip
        loader = loader_with_workers(self.pictures(4000, PICTURES), batch_size=64)
        scenes = (sample_scene(np.random.default_rng([self.stream(UNSEEN), i])) for i in range(4000))
        with on_device(clip) as device:
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
            "stages": {name: json.loads((self.work / name / RECORD).read_text()) for name in PARTS},
            "config": asdict(self.config),
            "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
            "python": platform.python_version(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: the recipe of the bundled model")
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="checkpoints and encoded pictures")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="where the model folder goes")
    parser.add_argument("--devices", default="auto", help="GPUs or, on a CPU, processes that share the work")
    words = "parts to train; another process must train those that they need in the same --work folder; default: all"
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help=words)


def main(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, ShapesConfig)
    if not rank_zero_only.rank:
        check_model_folder(arguments.out)
        claim_folder(arguments.work, "train-shapes", has_parts)
    recipe = Recipe(config, arguments.work, Machine(arguments.devices))
    for name in parts_in_order(arguments.parts):
        if name not in arguments.parts:
            wait_for_another(arguments.work / name / RECORD)
        recipe.load_or_train(name)
    if PARTS[-1] in arguments.parts and not rank_zero_only.rank:
        save_networks(recipe.networks, arguments.out, recipe.training_record())


def wait_for_another(record: Path) -> None:
    if not record.is_file():
        log.info("waiting for another process to train %s", record.parent)
    while not record.is_file():
        time.sleep(0.5)


def parts_in_order(wanted: Collection[str]) -> list[str]:
    """The wanted parts and the parts that they need. The last part saves the whole model, so it needs all."""
    if PARTS[-1] in wanted:
        return list(PARTS)
    needed = {*wanted, *(part for name in wanted for part in NEEDS.get(name, ()))}
    return [name for name in PARTS if name in needed]
