"""The commands `train-shapes` and `train-emoji`: train a bundled model from nothing, part by part.

    python -m clip_gen train-shapes [--config RECIPE.yaml] [--out checkpoints/shapes] [--work runs/shapes]

CLIP trains on pairs of pictures and captions; the VQGAN and the transformer on pictures only; CLIP's text tower learns
words that no caption used; the bridge gets the mean embeddings and a memory; and at last CLIP's image tower is trained
to rank. The work folder keeps every finished part, and an interrupted part resumes from its last checkpoint. With
--parts several processes can train different parts in one work folder at the same time, as in script/train-world.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

import clip_gen
from clip_gen.config import read_config
from clip_gen.files import claim_folder, folder_lock, sha256_of, write_text_atomic
from clip_gen.training.datasets import Endless
from clip_gen.training.fit import Machine, fit
from clip_gen.training.gpt_trainer import GPTTrainer, start_from_codes
from clip_gen.training.processes import wait_for
from clip_gen.training.sketch_trainer import SKETCH_PLACES, Sketching, SketchTrainer
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.model_folder import (
    LICENSES,
    VOCABULARY,
    build,
    check_model_folder,
    load_part,
    read_part,
    save_networks,
    save_part,
)
from clip_gen.worlds.bridge_measuring import fill_memory, measure_means
from clip_gen.worlds.clip_trainer import ClipTrainer, fill_unseen_words
from clip_gen.worlds.ranker_trainer import RankerTrainer, ranked_pictures
from clip_gen.worlds.recipe_config import RecipeConfig
from clip_gen.worlds.recipe_pictures import PAIRS, PICTURES, RANKED, UNSEEN, RecipePictures
from clip_gen.worlds.text_trainer import align_texts
from clip_gen.worlds.word_trainer import learn_words
from clip_gen.worlds.world import load_world

CONFIGS = Path(clip_gen.__file__).parent / "configs"
SETTINGS, RECORD = "settings.json", "record.json"  # in the folder of a part

# The parts in the order of training, each with the parts that it needs.
NEEDS = {
    "clip": (),
    "vqgan": (),
    "sketch": ("clip", "vqgan"),
    "gpt": ("clip", "vqgan", "sketch"),
    "text": ("clip",),
    "words": ("clip", "text"),
    "bridge": ("clip", "text", "words"),
    "ranker": ("clip", "vqgan", "sketch", "gpt", "text", "words", "bridge"),
}
ENCODING = ("encoded_pictures", "hard_pictures", "embedding_noise", "condition_dropout", "condition_blur")
# The fields of RecipeConfig, beside the seed and the sizes, that a part's weights depend on.
FIELDS = {
    "clip": ("clip_fit",),
    "vqgan": ("vqgan_fit",),
    "sketch": ("start", "sketch_fit", *ENCODING),
    "gpt": ("start", "gpt_fit", *ENCODING, "context_noise", "contrast", "temperature"),
    "text": ("text_steps", "encoded_pictures", "hard_pictures"),
    "words": ("word_steps",),
    "bridge": ("encoded_pictures",),
    "ranker": ("ranker_fit", "drawn_pictures"),
}
SHARED = ("vqgan", "sketch", "gpt")  # trained by all processes; the first process alone trains the others


class Recipe:
    """Trains the parts in a work folder."""

    def __init__(self, config: RecipeConfig, work: Path, machine: Machine | None = None):
        pl.seed_everything(config.seed)
        self.config, self.work, self.machine = config, work, machine or Machine()
        self.world = load_world(config.world)
        self.one_process = replace(self.machine, devices="1", nodes=1)
        self.networks = build(config.model)
        self.pictures = RecipePictures(config, self.world, work / "encoded", self.encoder)
        self.is_first = not rank_zero_only.rank

    def load_or_train(self, name: str) -> None:
        """Loads a part from the work folder, or trains it and saves it there."""
        folder, record = self.work / name, self.work / name / RECORD
        network, train = self.part(name)
        self.check_settings(name)
        if not record.is_file() and (self.is_first or name in SHARED):
            with self.lock(folder):
                if self.is_first:
                    write_text_atomic(folder / SETTINGS, json.dumps(self.settings(name)))
                pl.seed_everything(self.config.seed)
                values = train(folder)
                if self.is_first:
                    save_part(network, self.weights(name))
                    write_text_atomic(record, json.dumps(values))
        wait_for(record)
        # Also after training: the next parts must see the weights in float16, as published.
        load_part(network, self.weights(name))
        if network is self.networks.clip:
            fill_unseen_words(network, self.world.synonyms())
        network.eval().requires_grad_(False)

    def part(self, name: str) -> tuple[nn.Module, Callable[[Path], dict[str, object]]]:
        """The network of a part, and the function that trains it in a folder and returns what to record."""
        networks = self.networks
        parts = {
            "clip": (networks.clip, self.train_clip),
            "vqgan": (networks.vqgan, self.train_vqgan),
            "sketch": (Sketching(networks.gpt), self.train_sketch),
            "gpt": (networks.gpt, self.train_gpt),
            "text": (networks.clip, self.train_text),
            "words": (networks.clip, self.train_words),
            "bridge": (networks.bridge, self.measure_bridge),
            "ranker": (networks.clip, self.train_ranker),
        }
        return parts[name]

    def weights(self, name: str) -> Path:
        return self.work / name / f"{name}.safetensors"

    def fingerprint(self, name: str) -> str:
        """Identifies the weights of a finished part."""
        return sha256_of(self.weights(name))[:12]

    def encoder(self, part: str) -> tuple[nn.Module, str]:
        """The network of a finished part, and the fingerprint of its weights."""
        return self.part(part)[0], self.fingerprint(part)

    def lock(self, folder: Path) -> AbstractContextManager[None]:
        """Keeps other trainings out of a part's folder; ValueError while one is using it."""
        busy = f"{folder} is in use by another training; wait for it to end, or name another --work folder"
        return folder_lock(folder, busy) if self.is_first else nullcontext()

    def settings(self, name: str) -> dict[str, object]:
        """Everything that determines a part's weights, as JSON values."""
        values = asdict(self.config)
        settings = {field: values[field] for field in ("world", "seed", *FIELDS[name])} | {
            "sizes": values["model"].get(name)
        }
        return json.loads(json.dumps(settings | {part: self.fingerprint(part) for part in NEEDS[name]}))

    def check_settings(self, name: str) -> None:
        """ValueError if the work folder has this part by another recipe. An unfinished part may change its steps."""
        folder, settings = self.work / name, self.settings(name)
        is_finished, has_begun = ((folder / file).is_file() for file in (RECORD, SETTINGS))
        before = json.loads((folder / SETTINGS).read_text()) if has_begun else {}
        if not is_finished:
            for values in (before, settings):
                values.get(f"{name}_fit", {}).pop("steps", None)
        if (is_finished or has_begun) and before != settings:
            raise ValueError(f"{folder} was trained by another recipe; remove it, or name another --work folder")

    def train_clip(self, folder: Path) -> dict[str, object]:
        config, seed, clip = self.config.clip_fit, self.config.seed, self.networks.clip
        side, pairs = clip.config.image_resolution, self.world.captioned_pairs
        seen = self.pictures.of(pairs, config.steps * config.batch_size, PAIRS, side)
        unseen = self.pictures.of(pairs, 512, UNSEEN, side)
        collate = self.world.collate(clip.config.context_length)
        trainer = ClipTrainer(clip, self.world.choices, config)
        # In one process: if processes shared a batch, each caption would have fewer wrong pictures to compare with.
        record = fit("clip", trainer, seen, unseen, folder, seed=seed, machine=self.one_process, collate=collate)
        trainer.clear_unseen_words()
        return record

    def train_vqgan(self, folder: Path) -> dict[str, object]:
        config = self.config.vqgan_fit
        seen = self.pictures.of(self.world.vqgan_pictures, config.steps * config.batch_size, PICTURES)
        unseen = self.pictures.of(self.world.pictures, 512, UNSEEN)
        trainer = VQGANTrainer(self.networks.vqgan.train(), config)
        return fit("vqgan", trainer, seen, unseen, folder, seed=self.config.seed, machine=self.machine)

    def train_sketch(self, folder: Path) -> dict[str, object]:
        """A transformer without a sketch has nothing to train here."""
        gpt, seed = self.networks.gpt, self.config.seed
        if gpt.sketch is None:
            return {}
        seen, unseen = self.pictures.encoded(SKETCH_PLACES), self.pictures.unseen()
        trainer = SketchTrainer(gpt, self.config.sketch_fit)
        if self.config.start:
            load_part(gpt, Path(self.config.start) / "gpt.safetensors")
        else:
            trainer.sketching.start_from(torch.tensor(seen.embeddings[:4000], dtype=torch.float32))
        trainer.sketching.requires_grad_(True)
        return fit("sketch", trainer, Endless(seen, seed), unseen, folder, seed=seed, machine=self.machine)

    def train_gpt(self, folder: Path) -> dict[str, object]:
        config, seed, networks = self.config.gpt_fit, self.config.seed, self.networks
        seen, unseen = Endless(self.pictures.encoded(), seed), self.pictures.unseen()
        if self.config.start:
            self.start_gpt()
        else:
            start_from_codes(networks.gpt, networks.vqgan, seed)
        losses = {"contrast": self.config.contrast, "context_noise": self.config.context_noise}
        networks.gpt.train().requires_grad_(True)
        if networks.gpt.sketch is not None:
            Sketching(networks.gpt).requires_grad_(False)
        trainer = GPTTrainer(networks.gpt, config, **losses)
        record = fit("gpt", trainer, seen, unseen, folder, seed=seed, machine=self.machine)
        with torch.no_grad():
            networks.gpt.head.weight.div_(self.config.temperature)
        return record

    def start_gpt(self) -> None:
        """Loads the transformer to train further, at the temperature that it was trained with. Keeps the new sketch."""
        gpt = self.networks.gpt
        sketch = Sketching(gpt).state_dict() if gpt.sketch is not None else {}
        gpt.load_state_dict(read_part(gpt, Path(self.config.start) / "gpt.safetensors") | sketch)
        with torch.no_grad():
            gpt.head.weight.mul_(self.config.temperature)

    def train_text(self, folder: Path) -> dict[str, object]:
        """CLIP's text tower, without the words that were filled in, which follow from the others after the training."""
        if self.world.captions is None:
            return {}
        clip, config = self.networks.clip, self.config
        embeddings, captions = self.pictures.captioned()
        load_part(clip, self.weights("clip"))
        return align_texts(clip, embeddings, captions, config.text_steps, config.seed)

    def train_words(self, folder: Path) -> dict[str, object]:
        """Words that no caption used. In a world without such words nothing changes."""
        if self.world.synonym_captions is None:
            return {}
        return learn_words(self.networks.clip, self.world.synonym_captions, self.config.word_steps, self.config.seed)

    def measure_bridge(self, folder: Path) -> dict[str, object]:
        bridge, clip, world = self.networks.bridge, self.networks.clip, self.world
        unseen = self.pictures.of(world.pictures, 4000, UNSEEN)
        captions = [world.sampled_caption(unseen.rng(number)) for number in range(len(unseen))]
        gap = measure_means(bridge, clip, self.pictures.of(world.pictures, 4000, PICTURES), captions)
        if bridge.memory is not None:
            pictures = self.pictures.usual()
            numbers = range(min(4000, len(pictures)) if world.captions else 0)
            captions = [world.captions(pictures, number)[0] for number in numbers]
            fill_memory(bridge.memory, clip, np.load(self.pictures.encode("train", pictures, "clip")[0]), captions)
        return {"gap": round(gap, 4)}

    def train_ranker(self, folder: Path) -> dict[str, object]:
        """Without pictures to draw for it CLIP stays as it is."""
        if not self.config.drawn_pictures:
            return {}
        networks, seed = self.networks, self.config.seed
        pictures = self.pictures.of(self.world.captioned_pictures, self.config.drawn_pictures, RANKED)
        unseen_pictures = self.pictures.of(self.world.captioned_pictures, 512, UNSEEN)
        seen = ranked_pictures(networks, pictures, pictures.seed, folder, "drawn")
        unseen = ranked_pictures(networks, unseen_pictures, unseen_pictures.seed, folder, "unseen")
        trainer = RankerTrainer(networks.clip, self.config.ranker_fit)
        return fit("ranker", trainer, seen, unseen, folder, seed=seed, machine=self.one_process)

    def texts(self) -> dict[str, str]:
        """The texts of the model folder."""
        licenses = self.world.licenses
        texts = {VOCABULARY: self.world.vocabulary()}
        return texts | ({LICENSES: licenses.read_text(encoding="utf-8")} if licenses else {})

    def training_record(self) -> dict[str, object]:
        return {
            "data": f"{self.world.name}: the VQGAN and the transformer saw no caption and no held-out combination",
            "held_out": self.world.held_out(),
            "stages": {name: json.loads((self.work / name / RECORD).read_text()) for name in NEEDS},
            "config": asdict(self.config),
            "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
            "python": platform.python_version(),
        }


def add_arguments(parser: argparse.ArgumentParser, world: str) -> None:
    parser.set_defaults(world=world)
    parser.add_argument(
        "--config", type=Path, default=CONFIGS / f"{world}.yaml", help="default: the bundled model's recipe"
    )
    work, out = Path(f"runs/{world}"), Path(f"checkpoints/{world}")
    parser.add_argument("--work", type=Path, default=work, help=f"where parts are kept; default {work}")
    parser.add_argument("--out", type=Path, default=out, help=f"the model folder to write or replace; default {out}")
    parser.add_argument("--devices", default="auto", help="GPUs or, on a CPU, processes that share the work")
    words = "parts to train, with those they need that are missing; the ranker also writes --out; default: all"
    parser.add_argument("--parts", nargs="+", choices=NEEDS, default=list(NEEDS), help=words)


def main(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, RecipeConfig)
    if config.world != arguments.world:
        raise ValueError(f"{arguments.config} is a recipe of the world {config.world}; use train-{config.world}")
    if not rank_zero_only.rank:
        check_model_folder(arguments.out)
        claim_folder(arguments.work, f"train-{config.world}")
    recipe = Recipe(config, arguments.work, Machine(arguments.devices))
    needed = {*arguments.parts, *(part for name in arguments.parts for part in NEEDS[name])}
    for name in NEEDS:
        if name in needed:
            recipe.load_or_train(name)
    if "ranker" in needed and recipe.is_first:
        networks = replace(recipe.networks, texts=recipe.texts())
        save_networks(networks, arguments.out, recipe.training_record())
