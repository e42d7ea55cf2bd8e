"""The recipe of the bundled model: CLIP on pairs, then both stages on pictures alone, and last CLIP as a ranker.

    python -m clip_gen train-shapes [--config RECIPE.yaml] [--out checkpoints/shapes] [--work runs/shapes]

Each part is kept when done and skipped the next time; a part that was cut off goes on from its last checkpoint. With
--parts several processes train parts at a time in one work folder, each waiting for what the others train, as
script/train-shapes has it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import time
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

import clip_gen
from clip_gen.config import ModelConfig, read_config
from clip_gen.files import claim_folder, folder_lock, list_names, write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.training.datasets import EncodedPictures, Endless, enough_places
from clip_gen.training.encoding import encode_embeddings, encode_tokens
from clip_gen.training.fit import Machine, fit
from clip_gen.training.gpt_trainer import GPTTrainer, start_from_codes
from clip_gen.training.loading import loader_with_workers
from clip_gen.training.neighbours import find_neighbours
from clip_gen.training.processes import wait_for
from clip_gen.training.stage import FitConfig, compiled
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.model_folder import Networks, build, check_model_folder, load_part, save_networks, save_part
from clip_gen.worlds.shapes.captions import caption, describe
from clip_gen.worlds.shapes.clip_trainer import ClipTrainer, Collate
from clip_gen.worlds.shapes.pairs import CaptionedPairs, HardPictures, NearMisses, RenderedPictures
from clip_gen.worlds.shapes.ranker import RankedPictures, RankerTrainer, ranked_pictures
from clip_gen.worlds.shapes.scenes import HELD_OUT, sample_scene

log = logging.getLogger(__name__)

CONFIG = Path(clip_gen.__file__).parent / "configs" / "shapes.yaml"

# Streams of pictures that never meet: each is a seed of its own.
PAIRS, PICTURES, ENCODED, UNSEEN, RANKED = STREAMS = range(5)

ORDER = ("clip", "vqgan", "gpt", "bridge", "ranker")
NETWORK = {"ranker": "clip"}  # that a part goes on with
RESTS_ON = {"gpt": ("clip", "vqgan"), "bridge": ("clip",), "ranker": ("clip", "vqgan", "gpt")}
# The work that processes share; the rest is the first one's, and the others wait.
SHARED = ("vqgan", "gpt")


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
    """The parts in order, each resting on the ones before."""

    def __init__(self, config: ShapesConfig, work: Path, machine: Machine | None = None):
        pl.seed_everything(config.seed)
        self.config, self.work, self.machine = config, work, machine or Machine()
        self.networks: Networks = build(config.model)

    def stream(self, number: int) -> int:
        return len(STREAMS) * self.config.seed + number

    def part(self, name: str) -> None:
        """Loads the part from the work folder, or trains it and leaves it there."""
        folder, told = self.work / name, self.told(name)
        record, first = folder / "record.json", not rank_zero_only.rank
        other = f"{folder} was trained by another recipe; remove it, or name another --work folder"
        if not record.is_file() and (name in SHARED or first):
            busy = f"{folder} is in use by another training; wait for it to end, or name another --work folder"
            with folder_lock(folder, busy) if first else nullcontext():
                if first and not goes_on(folder / "told.json", told):
                    raise ValueError(other)
                pl.seed_everything(self.config.seed)
                values = getattr(self, f"train_{name}")(folder)
                if first:
                    save_part(getattr(self.networks, NETWORK.get(name, name)), folder / f"{name}.safetensors")
                    self.load(name)
                    self.encode(name)  # before the record, which other processes wait for
                    write_json(record, values | {"told": told})
        wait_for(record)
        if json.loads(record.read_text())["told"] != told:
            raise ValueError(other)
        self.load(name)

    def load(self, name: str) -> None:
        """Even when just trained, so that what comes next sees the weights as they will ship: float16."""
        network = getattr(self.networks, NETWORK.get(name, name))
        load_part(network, self.work / name / f"{name}.safetensors")
        network.eval().requires_grad_(False)

    def told(self, name: str) -> dict[str, object]:
        """All that decides what a part turns into, as JSON has it."""
        settings: dict[str, object] = {"seed": self.config.seed}
        if name in ("clip", "vqgan", "gpt"):
            settings["sizes"] = stated(getattr(self.config.model, name))
        if name != "bridge":
            settings["fit"] = stated(getattr(self.config, f"{name}_fit"))
        if name == "gpt":
            names = ("encoded_pictures", "embedding_noise", "condition_dropout", "condition_blur", "contrast")
            settings |= {name: getattr(self.config, name) for name in names}
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
        """The pictures the transformer trains on, "train", or those its loss is watched on, "unseen"."""
        embeddings, tokens = self.array("clip", name), self.array("vqgan", name)
        missed, neighbours = None, None
        if self.config.contrast and name == "train":
            missed = self.array("clip", "missed")
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
        """What the transformer will learn from, while another process may be training the other network."""
        names = {"clip": ("train", "missed", "unseen"), "vqgan": ("train", "unseen")}.get(part, ())
        for name in names:
            if name != "missed" or self.config.contrast:
                self.array(part, name)

    def array(self, part: str, name: str) -> Path:
        """These pictures' embeddings by CLIP, or tokens by the VQGAN; made unless they are there."""
        count, stream = (1024, UNSEEN) if name == "unseen" else (self.config.encoded_pictures, ENCODED)
        kind, network = NearMisses if name == "missed" else RenderedPictures, getattr(self.networks, part)
        pictures = kind(count, self.stream(stream), self.config.model.vqgan.resolution)
        # An array is of use only to the network that made it.
        mark = fingerprint(self.work / part / f"{part}.safetensors")
        path = self.work / "encoded" / f"{part}-{mark}-{name}-{count}.npy"
        if self.config.gpt_fit.compile and part == "clip":
            compiled(network.clip.visual)
        elif self.config.gpt_fit.compile:
            compiled(network.encoder, dynamic=network.config.local)
        return (encode_embeddings if part == "clip" else encode_tokens)(pictures, network, path)

    @torch.no_grad()
    def train_bridge(self, folder: Path) -> dict[str, object]:
        """The mean of each side, over 4,000 pictures of the generator's and the captions of 4,000 other scenes."""
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
            "stages": {name: json.loads((self.work / name / "record.json").read_text()) for name in ORDER},
            "config": asdict(self.config),
            "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
            "python": platform.python_version(),
        }


def goes_on(path: Path, told: dict[str, object]) -> bool:
    """Notes what a part is told; False where it was begun otherwise. To go on for longer is not otherwise."""

    def lasting(settings: dict[str, object]) -> dict[str, object]:
        fit = {name: value for name, value in settings.get("fit", {}).items() if name != "steps"}
        return settings | {"fit": fit}

    if path.is_file() and lasting(json.loads(path.read_text())) != lasting(told):
        return False
    write_json(path, told)
    return True


def write_json(path: Path, values: dict[str, object]) -> None:
    write_text_atomic(path, json.dumps(values))


def stated(config: object) -> dict[str, object]:
    """The fields that differ from their defaults: a setting that is new since then does not make another recipe."""
    values = {spec.name: (getattr(config, spec.name), spec.default) for spec in fields(config)}
    return {name: value for name, (value, default) in values.items() if value != default}


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: the recipe of the bundled model")
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="checkpoints and encoded pictures")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="where the model folder goes")
    parser.add_argument("--devices", default="auto", help="GPUs or, on a CPU, processes that share the work")
    words = "those to train; others that they rest on another process trains in the same --work folder"
    parser.add_argument("--parts", nargs="+", choices=ORDER, default=list(ORDER), help=f"{words}; all by default")


def main(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, ShapesConfig)
    if not rank_zero_only.rank:
        check_model_folder(arguments.out)
        claim_folder(arguments.work, "train-shapes", _has_parts)
    recipe = Recipe(config, arguments.work, Machine(arguments.devices))
    for name in parts_in_order(arguments.parts):
        if name not in arguments.parts:
            wait_for_another(arguments.work / name / "record.json")
        recipe.part(name)
    if ORDER[-1] in arguments.parts and not rank_zero_only.rank:
        save_networks(recipe.networks, arguments.out, recipe.training_record())


def _has_parts(work: Path) -> bool:
    """Whether a version of this command that wrote no mark made the folder: it holds parts and nothing else."""
    written = [*work.glob("*/told.json"), *work.glob("*/record.json")]
    return bool(written) and set(list_names(work)) <= {*ORDER, "encoded"} and all(map(_is_of_a_part, written))


def _is_of_a_part(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and ("told" in values or "seed" in values)


def wait_for_another(record: Path) -> None:
    if not record.is_file():
        log.info("waiting for %s, which another process is to train", record.parent)
    while not record.is_file():
        time.sleep(0.5)


def parts_in_order(wanted: Collection[str]) -> list[str]:
    """These and what they rest on; with the last one, whose model is whole, all."""
    if ORDER[-1] in wanted:
        return list(ORDER)
    needed = {*wanted, *(below for name in wanted for below in RESTS_ON.get(name, ()))}
    return [name for name in ORDER if name in needed]
