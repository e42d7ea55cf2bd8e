"""A training from pictures to a model folder and a weights tar.

    python -m clip_gen train photos.zip --out weights

The folder `out` holds weights.tar, model/, report.html, and work/, from which the same command resumes. With several
processes the first one writes, and the others wait for its files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import Dataset

from clip_gen.data.manifest import Pictures
from clip_gen.data.sources import find_sources
from clip_gen.files import folder_lock, write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.training import folder as training_folder
from clip_gen.training.base import JUDGED_PICTURES, Choice, settle_base
from clip_gen.training.checkpoints import PREVIOUS, find_checkpoint, has_checkpoint
from clip_gen.training.copies import find_copies
from clip_gen.training.datasets import EncodedPictures, Endless, PictureFiles, loader_with_workers, split_pictures
from clip_gen.training.decisions import choose_lpips, left_out, settle_tokens, warn_if_poor
from clip_gen.training.encoding import encode_held_back, encode_train_pictures, remove_incomplete_parts
from clip_gen.training.evaluations import Drawing, Evaluations, reconstruct, sample_with
from clip_gen.training.expectation import log_expectation
from clip_gen.training.fit import Machine, fit
from clip_gen.training.gpt_trainer import GPTTrainer, start_from_codes
from clip_gen.training.grids import ReconstructionGrids, SampleGrids, sample_prompts
from clip_gen.training.live_report import LiveReport
from clip_gen.training.loggers import build_loggers, logger_names
from clip_gen.training.lora import choose_parameters, merge_lora
from clip_gen.training.minutes import Minutes
from clip_gen.training.near_duplicates import without_near_duplicates
from clip_gen.training.plan import FEW_PICTURES, TrainSettings, plan
from clip_gen.training.processes import announce, wait_for, wait_for_announcement
from clip_gen.training.progress import Forecast, stage_title
from clip_gen.training.report import earlier_record, log_finished, training_record, write_report
from clip_gen.training.shards import shard_parts
from clip_gen.training.stage import Stage
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights import model_folder
from clip_gen.weights.default_model import default_model
from clip_gen.weights.tarball import pack, resolve_weights

log = logging.getLogger(__name__)

RECORD = "record.json"  # of a finished stage
STAGES = {"both": ("vqgan", "gpt"), "vqgan": ("vqgan",), "transformer": ("gpt",)}


class Training:
    """One training in its folder."""

    def __init__(self, images: Path | list[str], out: Path, settings: TrainSettings, machine: Machine | None = None):
        self.names = [images] if isinstance(images, Path) else images
        self.out, self.work = out, out / "work"
        self.settings, self.machine = settings, machine or Machine()
        self.stages = STAGES.get(settings.stage, ())
        self.choice: Choice | None = None  # of base auto
        self.is_first = not rank_zero_only.rank
        self.records: dict[str, dict[str, object]] = {}  # of the finished stages
        self.minutes = Minutes(self.work, settings.max_minutes)

    def run(self) -> Path:
        """Trains the unfinished stages and returns the weights tar; ValueError for inputs that cannot be used."""
        self.check()
        self.load_base()
        if self.is_first:
            training_folder.claim(self.out)
        else:
            wait_for_announcement(self.work / "ready")
        busy = f"{self.out} is in use by another training; wait for it to end, or name another folder"
        with folder_lock(self.work, busy) if self.is_first else nullcontext():
            self.pictures = self.unpack_pictures()
            settle_base(self)
            self.plan_stages()
            self.clean_folder()
            self.build_networks()
            was_finished = all(self.is_finished(stage) for stage in self.stages)
            if self.is_first:
                if not any(has_checkpoint(self.work / stage) or self.is_finished(stage) for stage in self.stages):
                    self.minutes.expected = log_expectation(self)
                self.measure_pictures()
                self.announce_report(was_finished)
            self.train_stages()
            if self.is_first:
                self.export(was_finished)
        return self.out / "weights.tar"

    def check(self) -> None:
        """ValueError for settings and folders that cannot be used. Writes nothing."""
        self.settings.check()
        logger_names(self.machine.loggers)
        self.machine.trainer()
        if self.is_first:  # the others would see what the first has begun to write
            training_folder.check(self.out)
        self.images = find_sources(self.names)
        self.images.check_outside(self.out)

    def load_base(self) -> None:
        """Downloads and loads the base model that the settings name, or else the model that predicts.

        With its memory, which settle_base looks at.
        """
        settings = self.settings
        named = default_model(os.environ.get("COG_WEIGHTS"))[0] if settings.chooses_base else settings.base
        self.base = resolve_weights(named)
        needs_vqgan = settings.size == "base"
        self.networks = model_folder.load_base(self.base, needs_vqgan, keeps_memory=True)

    def on_gpu(self) -> bool:
        """Whether the training has a GPU. One that resumes on another machine keeps its plan."""
        return training_folder.saved_settings(self.out).get("on_gpu", torch.cuda.is_available())

    def unpack_pictures(self) -> Pictures:
        """Unpacks the pictures once. Copies from shards are large enough for the resolution of the training."""
        settings = self.settings
        resolution = self.networks.config.vqgan.resolution if settings.size == "base" else settings.resolution
        return training_folder.unpack_once(self.images, self.out, settings, self.machine.shard_gb, resolution)

    def sample_of_pictures(self) -> list[Path]:
        """Some pictures at random, to judge a base on."""
        held_back, others = split_pictures(self.pictures.paths, self.settings.seed)
        return [*held_back, *others][:JUDGED_PICTURES]

    def plan_stages(self, is_dry: bool = False) -> None:
        """Plans the stages and saves the settings; ValueError if the training in the folder has others."""
        saved, on_gpu = training_folder.saved_settings(self.out), self.on_gpu()
        self.networks = model_folder.forget_memory(self.networks)
        if saved and self.settings.lora == "auto":  # earlier versions had no LoRA
            self.settings = replace(self.settings, lora=saved.get("lora", "off"))
        settings = self.settings
        self.pictures = without_near_duplicates(self.pictures, self.networks.clip, settings.drop_similar, self.work)
        self.held_back_paths, self.train_paths = split_pictures(self.pictures.paths, self.settings.seed)
        if settings.mean_shift and not self.networks.bridge.text_mean.any():
            # Not measured, as in an imported model; a shift from it would be meaningless.
            log.info("the base's texts have no mean, so prompts stay where they are (mean_shift 0)")
            settings = replace(settings, mean_shift=0.0)
        self.tokens = settle_tokens(self, is_dry)
        counts = self.pictures.count, on_gpu, self.has_new_transformer()
        self.plan = plan(settings, self.networks.config, *counts, self.tokens)
        self.machine = self.machine.with_gpus_for(self.plan.vqgan.batch_size, self.plan.transformer.batch_size)
        if self.is_first and not is_dry:
            training_folder.save_settings(self.out, self.settings, self.base, on_gpu)

    def clean_folder(self) -> None:
        """Removes what an earlier start left incomplete, and tells the other processes that the folder is ready."""
        if self.is_first:
            training_folder.remove_incomplete_files(self.out)
            self.reopen_last_stage()
            if not has_checkpoint(self.work / "gpt"):  # which depends on the views
                remove_incomplete_parts(self.work / "encoded")
            self.ready = announce(self.work / "ready")

    def reopen_last_stage(self) -> None:
        """The last stage trains further if its time limit ended it and there is more time now. Earlier stages do not:
        the next stage depends on their result.
        """
        name, minutes = self.stages[-1], self.settings.max_minutes
        if not self.is_finished(name):
            return
        values = self.stage_record(name)
        has_more_time = values.get("ended_by") == "time" and (minutes == 0 or minutes > values["max_minutes"])
        if has_more_time and find_checkpoint(self.work / name):
            log.info("%s: max_minutes ended it at step %d; it continues", name, values["steps"])
            (self.work / name / RECORD).unlink()

    def build_networks(self) -> None:
        """The base's networks, or new ones beside its CLIP."""
        if self.has_new_transformer():
            torch.manual_seed(self.settings.seed)
            new = model_folder.build(self.plan.model)
            vqgan = self.networks.vqgan if self.settings.size == "base" else new.vqgan
            self.networks = replace(self.networks, vqgan=vqgan, gpt=new.gpt)
        self.networks = replace(self.networks, config=self.plan.model)
        self.networks.bridge.config = self.plan.model.bridge
        self.networks.clip.requires_grad_(False)

    def has_new_transformer(self) -> bool:
        return self.settings.size != "base" or not (self.base / "gpt.safetensors").is_file()

    @torch.no_grad()
    def measure_pictures(self) -> None:
        """Sets the bridge's image mean to that of these pictures; its text mean stays the base's."""
        loader = loader_with_workers(self.picture_files(self.train_paths[:4000]), batch_size=64)
        with on_device(self.networks.clip) as device:
            embeddings = torch.cat([self.networks.clip.encode_image(from_bytes(batch.to(device))) for batch in loader])
        self.networks.bridge.image_mean.copy_(embeddings.mean(dim=0))

    def picture_files(self, paths: Sequence[Path]) -> PictureFiles:
        return PictureFiles(paths, self.plan.model.vqgan.resolution, **self.plan.augmentation(self.settings))

    def train_stages(self) -> None:
        """Trains the unfinished stages, loads the results into the networks, and sets the record of each."""
        if "vqgan" in self.stages:
            if not self.is_finished("vqgan"):
                self.save_stage("vqgan", self.networks.vqgan, self.train_vqgan(self.work / "vqgan"))
            self.records["vqgan"] = self.load_stage("vqgan", self.networks.vqgan)
        if "gpt" in self.stages:
            if not self.is_finished("gpt"):
                self.save_stage("gpt", self.networks.gpt, self.train_gpt(self.work / "gpt"))
            self.records["gpt"] = self.load_stage("gpt", self.networks.gpt)

    def is_finished(self, stage: str) -> bool:
        return (self.work / stage / RECORD).is_file()

    def stage_record(self, stage: str) -> dict[str, object]:
        return json.loads((self.work / stage / RECORD).read_text())

    def save_stage(self, stage: str, network: nn.Module, values: dict[str, object]) -> None:
        """Writes the weights and then the record, for which the other processes wait."""
        if self.is_first:
            folder = self.work / stage
            (folder / PREVIOUS).unlink(missing_ok=True)
            model_folder.save_part(network.cpu(), folder / f"{stage}.safetensors")
            write_text_atomic(folder / RECORD, json.dumps(values | {"max_minutes": self.settings.max_minutes}))

    def load_stage(self, stage: str, network: nn.Module) -> dict[str, object]:
        """Loads the weights as they will be exported, also right after training; returns the stage's record."""
        wait_for(self.work / stage / RECORD)
        model_folder.load_part(network, self.work / stage / f"{stage}.safetensors")
        network.eval().requires_grad_(False)
        return self.stage_record(stage)

    def train_vqgan(self, folder: Path) -> dict[str, object]:
        settings, held_back = self.settings, self.picture_files(self.held_back_paths)
        if not self.plan.vqgan.steps:
            return left_out(self.networks.vqgan, held_back)
        keeps_tokens = self.tokens.kept
        vqgan = self.networks.vqgan.train().requires_grad_(True)
        has_perceptual_loss = self.plan.vqgan_loss.perceptual > 0
        lpips = choose_lpips(folder, vqgan.config.resolution) if has_perceptual_loss else None
        torch.manual_seed(settings.seed)  # for a new discriminator
        discriminator = model_folder.load_discriminator(self.base) if settings.size == "base" else None
        config, loss, features = self.plan.vqgan, self.plan.vqgan_loss, lpips or self.networks.clip
        trainer = VQGANTrainer(vqgan, config, loss, features, discriminator=discriminator, decoder_only=keeps_tokens)
        samples = Endless(self.picture_files(self.train_paths), settings.seed)
        callbacks = [ReconstructionGrids(held_back, folder), *self.evaluations("vqgan", reconstruct)]
        values = self.fit("vqgan", trainer, samples, held_back, callbacks, keeps_tokens)
        values["tokens_kept"] = keeps_tokens
        if has_perceptual_loss:
            values["perceptual_loss"] = "CLIP" if lpips is None else "LPIPS"
        return values

    def train_gpt(self, folder: Path) -> dict[str, object]:
        settings, networks = self.settings, self.networks
        is_judged = settings.stage == "transformer" and self.is_first
        quality = warn_if_poor(self) if is_judged else {}
        if self.is_first:
            self.report({}, [], "Running: the pictures are encoded for the transformer.")
        pictures, held_back = self.encode_train_pictures(), self.picture_files(self.held_back_paths)
        held_back = encode_held_back(held_back, networks, self.work / "encoded", settings.max_minutes)
        if self.has_new_transformer():
            start_from_codes(networks.gpt, networks.vqgan, settings.seed)
        torch.manual_seed(settings.seed)
        choose_parameters(networks.gpt.train(), self.plan.lora_rank, self.tokens.known)
        trainer = GPTTrainer(
            networks.gpt,
            self.plan.transformer,
            contrast=settings.contrast_weight,
            embedding_loss=settings.embedding_loss_weight,
            vqgan=networks.vqgan,
            clip=networks.clip,
        )
        prompts = sample_prompts(settings.sample_prompts, networks.clip)
        callbacks = [SampleGrids(networks, held_back, prompts, folder, settings.seed)]
        callbacks += self.evaluations("gpt", sample_with(networks, settings.seed))
        samples = Endless(pictures, settings.seed)
        values = self.fit("gpt", trainer, samples, held_back, callbacks, self.tokens.known)
        merge_lora(networks.gpt)
        if self.is_first and (self.plan.lora_rank or self.pictures.count <= FEW_PICTURES):
            values |= find_copies(networks, self.picture_files(self.train_paths), settings.seed)
        encoded = {"pictures": len(pictures), "views": pictures.rows, "places": pictures.places or "all"}
        return values | quality | encoded

    def evaluations(self, stage: str, draw: Drawing) -> list[Callback]:
        """What measures held-back pictures, if the command asks for it."""
        every, pictures = self.machine.evaluate_every, self.picture_files(self.held_back_paths)
        return [Evaluations(stage, every, pictures, self.networks.clip, draw, self.work / stage)] if every else []

    def encode_train_pictures(self) -> EncodedPictures:
        files, seed = self.picture_files(self.train_paths), self.settings.seed
        streamed = shard_parts(self.images.shards, self.pictures, self.held_back_paths, files.squares, seed)
        counts = self.plan.views, self.pictures.estimated
        return encode_train_pictures(files, self.networks, self.work / "encoded", self.settings, streamed, *counts)

    def fit(
        self,
        name: str,
        trainer: Stage,
        samples: Endless,
        held_back: Dataset,
        callbacks: list[Callback],
        fine_tunes: bool,
    ) -> dict[str, object]:
        settings, steps = self.settings, trainer.config.steps
        is_last = name == self.stages[-1]
        minutes = self.minutes.for_stage(is_last, (record["minutes"] for record in self.records.values()))
        machine = replace(self.machine, max_minutes=minutes, minutes_after=self.minutes.after(minutes, is_last))
        forecast = Forecast(name, stage_title(name, self.stages), minutes, settings.max_minutes, fine_tunes)
        live = LiveReport(forecast, lambda values, warnings, how_far: self.report({name: values}, warnings, how_far))
        loggers = build_loggers(machine.loggers, name, self.out)
        options = {"machine": machine, "callbacks": [forecast, *callbacks, live], "loggers": loggers}
        if self.is_first:
            self.minutes.save()
        values = fit(name, trainer, samples, held_back, self.work / name, seed=settings.seed, **options)
        self.minutes.leave_out()
        values |= {"planned_steps": steps, "fine_tunes": fine_tunes}
        return values | ({"forecast_steps": forecast.steps} if forecast.steps is not None else {})

    def announce_report(self, was_finished: bool) -> None:
        if not was_finished:
            self.report({}, [], "Running: the training begins.")
            log.info("report: %s, renewed while the training runs", self.out / "report.html")
            if "tensorboard" in logger_names(self.machine.loggers):
                log.info("curves: tensorboard --logdir %s", self.work / "logs")

    def report(self, stage: Mapping[str, object], warnings: Sequence[str], running: str) -> None:
        """Writes report.html while the training runs. stage: the unfinished stage's record so far, by its name."""
        record = self.record(self.records | stage)
        record["warnings"] = [*record["warnings"], *warnings]
        write_report(self.out / "report.html", self.work, record, running)

    def export(self, was_finished: bool) -> None:
        """Writes the model folder, weights.tar and report.html."""
        if was_finished:
            log_finished(self.out, self.records)
        record = self.record(self.records) | earlier_record(self.out / "model", self.records)
        model_folder.save_networks(self.networks, self.out / "model", record)
        pack(self.out / "model", self.out / "weights.tar")
        write_report(self.out / "report.html", self.work, record)
        for sentence in record["warnings"]:
            log.warning(sentence)
        log.info("weights: %s  report: %s", self.out / "weights.tar", self.out / "report.html")
        if self.settings.stage == "vqgan" and not self.tokens.known:
            log.warning("the transformer does not know these tokens yet: train stage transformer from these weights")

    def record(self, stages: dict[str, dict[str, object]]) -> dict[str, object]:
        minutes = self.minutes.outside() + sum(values["minutes"] for values in stages.values())
        knows = self.networks.texts.get(model_folder.VOCABULARY, "").partition("\n")[0]
        choice = asdict(self.choice) if self.choice else {}
        base = {"name": self.choice.name if self.choice else self.base.name, "knows": knows, **choice}
        held_back = len(self.held_back_paths)
        return training_record(self.settings, self.plan, self.pictures, held_back, stages, minutes, base)
