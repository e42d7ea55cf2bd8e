"""A training from pictures to a model folder and a weights tar.

    python -m clip_gen train photos.zip --out weights

The folder `out` holds weights.tar, model/, report.html, and work/, from which the same command resumes. With several
processes the first one writes, and the others wait for its files.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback
from torch import nn

from clip_gen.data.archive import check_outside
from clip_gen.data.manifest import unpacked
from clip_gen.files import folder_lock, write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.training.callbacks import Clock
from clip_gen.training.checkpoints import PREVIOUS, find_checkpoint, has_checkpoint
from clip_gen.training.datasets import EncodedPictures, Endless, PictureFiles, split_pictures
from clip_gen.training.decisions import choose_lpips, decide_to_keep_tokens, warn_if_poor
from clip_gen.training.encoding import encode_held_back, encode_train_pictures, remove_incomplete_views
from clip_gen.training.fit import Machine, fit
from clip_gen.training.folder import (
    PICTURES,
    check_training_folder,
    claim_training_folder,
    remove_incomplete_files,
    save_settings,
    saved_settings,
    unpack_once,
)
from clip_gen.training.gpt_trainer import GPTTrainer, start_from_codes
from clip_gen.training.grids import ReconstructionGrids, SampleGrids
from clip_gen.training.loading import loader_with_workers
from clip_gen.training.plan import TrainSettings, plan, prompts_of, remedy
from clip_gen.training.processes import announce, wait_for, wait_for_announcement
from clip_gen.training.progress import Forecast, Reach
from clip_gen.training.report import earlier_record, log_finished, training_record, write_report
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.default_model import default_model
from clip_gen.weights.model_folder import (
    build,
    load_base,
    load_discriminator,
    load_part,
    save_networks,
    save_part,
    transformer_matches,
)
from clip_gen.weights.tarball import pack, resolve_weights

log = logging.getLogger(__name__)

RECORD = "record.json"  # of a finished stage
VQGAN_TIME = 0.2  # of max_minutes; the transformer gets the rest
MIN_MINUTES = 0.1  # for the transformer, however long the steps before it took
JUDGED_PICTURES = 64  # on which a base's VQGAN is measured
STAGES = {"both": ("vqgan", "gpt"), "vqgan": ("vqgan",), "transformer": ("gpt",)}


class Training:
    """One training in its folder."""

    def __init__(self, images: Path, out: Path, settings: TrainSettings, machine: Machine | None = None):
        self.images, self.out, self.work = images, out, out / "work"
        self.settings, self.machine = settings, machine or Machine()
        self.stages = STAGES.get(settings.stage, ())
        self.is_first = not rank_zero_only.rank
        self.began = time.monotonic()

    def run(self) -> Path:
        """Trains the unfinished stages and returns the weights tar; ValueError for inputs that cannot be used."""
        self.check()
        self.load_base()
        self.claim_folder()
        with self.lock():
            self.prepare()
            self.measure_pictures()
            is_finished = all(self.is_finished(stage) for stage in self.stages)
            records = self.train_stages()
            if self.is_first:
                self.export(records, is_finished)
        return self.out / "weights.tar"

    def check(self) -> None:
        """ValueError for settings and folders that cannot be used. Writes nothing."""
        self.settings.check()
        self.machine.check()
        if self.is_first:  # the others would see what the first has begun to write
            check_training_folder(self.out)
        check_outside(self.images, self.out)

    def load_base(self) -> None:
        """Downloads and loads the base model."""
        self.base = resolve_weights(self.settings.base or default_model(os.environ.get("COG_WEIGHTS"))[0])
        self.networks = load_base(self.base)

    def claim_folder(self) -> None:
        """Creates the folder; processes other than the first wait until it has prepared the folder at this start."""
        if self.is_first:
            claim_training_folder(self.out)
        else:
            wait_for_announcement(self.work / "ready")

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other trainings out of the folder; ValueError while one is using it."""
        busy = f"{self.out} is in use by another training; wait for it to end, or name another folder"
        return folder_lock(self.work, busy) if self.is_first else nullcontext()

    def prepare(self) -> None:
        """Unpacks the pictures, plans the stages and builds the networks."""
        self.pictures = unpack_once(self.images, self.out) if self.is_first else unpacked(self.work / PICTURES)
        # A training that resumes on another machine keeps its plan.
        on_gpu = saved_settings(self.out).get("on_gpu", torch.cuda.is_available())
        self.plan = plan(self.settings, self.networks.config, len(self.pictures.paths), on_gpu)
        self.machine = self.machine.with_gpus_for(self.plan.vqgan.batch_size, self.plan.transformer.batch_size)
        self.held_back_paths, self.train_paths = split_pictures(self.pictures.paths, self.settings.seed)
        if self.is_first:
            save_settings(self.out, self.settings, self.base, on_gpu)
            remove_incomplete_files(self.out)
            self.reopen_last_stage()
            if not has_checkpoint(self.work / "gpt"):  # which depends on the views
                remove_incomplete_views(self.work / "encoded", len(self.train_paths) * self.plan.views)
        self.clock = Clock(self.work, self.stages, self.began)
        if self.is_first:
            self.ready = announce(self.work / "ready")
        self.build_networks()

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
        if self.settings.size != "base":
            torch.manual_seed(self.settings.seed)
            self.networks = build(self.plan.model)
            load_part(self.networks.clip, self.base / "clip.safetensors")
            load_part(self.networks.bridge, self.base / "bridge.safetensors")
        if not self.networks.bridge.text_mean.any():
            # Not measured, as in an imported model; a shift from it would be meaningless.
            if self.settings.mean_shift:
                log.info("the base's texts have no mean, so prompts stay where they are (mean_shift 0)")
            bridge = replace(self.plan.model.bridge, mean_shift=0.0)
            self.plan = replace(self.plan, model=replace(self.plan.model, bridge=bridge))
        self.networks = replace(self.networks, config=self.plan.model)
        self.networks.bridge.config = self.plan.model.bridge
        self.networks.clip.requires_grad_(False)

    @torch.no_grad()
    def measure_pictures(self) -> None:
        """Sets the bridge's image mean to that of these pictures; its text mean stays the base's."""
        if not self.is_first:
            return
        loader = loader_with_workers(self.picture_files(self.train_paths[:4000]), batch_size=64)
        with on_device(self.networks.clip) as device:
            embeddings = torch.cat([self.networks.clip.encode_image(from_bytes(batch.to(device))) for batch in loader])
        self.networks.bridge.image_mean.copy_(embeddings.mean(dim=0))

    def picture_files(self, paths: Sequence[Path]) -> PictureFiles:
        settings, resolution = self.settings, self.plan.model.vqgan.resolution
        crop = 0.8 if settings.crop else 1.0
        return PictureFiles(paths, resolution, crop, settings.flip, settings.shift)

    def train_stages(self) -> dict[str, dict[str, object]]:
        """Trains the unfinished stages, loads the results into the networks, and returns the record of each."""
        records = {}
        if "vqgan" in self.stages:
            if not self.is_finished("vqgan"):
                self.save_stage("vqgan", self.networks.vqgan, self.train_vqgan(self.work / "vqgan"))
            records["vqgan"] = self.load_stage("vqgan", self.networks.vqgan)
        if "gpt" in self.stages:
            if not self.is_finished("gpt"):
                self.save_stage("gpt", self.networks.gpt, self.train_gpt(self.work / "gpt"))
            records["gpt"] = self.load_stage("gpt", self.networks.gpt)
        return records

    def is_finished(self, stage: str) -> bool:
        return (self.work / stage / RECORD).is_file()

    def stage_record(self, stage: str) -> dict[str, object]:
        return json.loads((self.work / stage / RECORD).read_text())

    def save_stage(self, stage: str, network: nn.Module, values: dict[str, object]) -> None:
        """Writes the weights and then the record, for which the other processes wait."""
        if not self.is_first:
            return
        folder = self.work / stage
        (folder / PREVIOUS).unlink(missing_ok=True)
        save_part(network.cpu(), folder / f"{stage}.safetensors")
        write_text_atomic(folder / RECORD, json.dumps(values | {"max_minutes": self.settings.max_minutes}))
        self.clock.save()

    def load_stage(self, stage: str, network: nn.Module) -> dict[str, object]:
        """Loads the weights as they will be exported, also right after training; returns the stage's record."""
        wait_for(self.work / stage / RECORD)
        load_part(network, self.work / stage / f"{stage}.safetensors")
        network.eval().requires_grad_(False)
        return self.stage_record(stage)

    def train_vqgan(self, folder: Path) -> dict[str, object]:
        settings, held_back = self.settings, self.picture_files(self.held_back_paths)
        keeps_tokens = self.keeps_tokens(folder / "tokens.json")
        vqgan = self.networks.vqgan.train().requires_grad_(True)
        has_perceptual_loss = self.plan.vqgan_loss.perceptual > 0
        lpips = choose_lpips(folder, vqgan.config.resolution) if has_perceptual_loss else None
        torch.manual_seed(settings.seed)  # for a new discriminator
        trainer = VQGANTrainer(
            vqgan,
            self.plan.vqgan,
            self.plan.vqgan_loss,
            lpips or self.networks.clip,
            discriminator=load_discriminator(self.base) if settings.size == "base" else None,
            decoder_only=keeps_tokens,
        )
        samples = Endless(self.picture_files(self.train_paths), settings.seed)
        minutes = self.minutes_left("vqgan") if settings.stage == "vqgan" else VQGAN_TIME * settings.max_minutes
        grids = ReconstructionGrids(held_back, folder)
        values = self.fit("vqgan", trainer, samples, held_back, minutes, grids, fine_tunes=keeps_tokens)
        values["tokens_kept"] = keeps_tokens
        if has_perceptual_loss:
            values["perceptual_loss"] = "CLIP" if lpips is None else "LPIPS"
        return values

    def keeps_tokens(self, decision: Path) -> bool:
        """Whether only the decoder trains, so the tokens keep the meaning that the base's transformer has learnt."""
        settings = self.settings
        if settings.tokens != "auto" or settings.size != "base" or not transformer_matches(self.base):
            return settings.tokens == "keep"
        return decide_to_keep_tokens(self.networks.vqgan, self.judged_pictures(), decision)

    def judged_pictures(self) -> PictureFiles:
        """The pictures on which the base's VQGAN is measured."""
        return self.picture_files([*self.held_back_paths, *self.train_paths][:JUDGED_PICTURES])

    def train_gpt(self, folder: Path) -> dict[str, object]:
        settings, networks = self.settings, self.networks
        quality = {}
        if settings.stage == "transformer" and self.is_first:
            quality = warn_if_poor(networks.vqgan, self.judged_pictures())
        pictures, held_back = self.encode_train_pictures(), self.encode_held_back()
        self.clock.save()
        if settings.size != "base":
            start_from_codes(networks.gpt, networks.vqgan, settings.seed)
        trainer = GPTTrainer(
            networks.gpt.train().requires_grad_(True),
            self.plan.transformer,
            contrast=settings.contrast_weight,
            embedding_loss=settings.embedding_loss_weight,
            vqgan=networks.vqgan,
            clip=networks.clip,
        )
        minutes, samples = self.minutes_left("gpt"), Endless(pictures, settings.seed)
        grids = SampleGrids(networks, held_back, self.sample_prompts(), folder, settings.seed)
        values = self.fit("gpt", trainer, samples, held_back, minutes, grids, fine_tunes=self.gpt_knows_tokens())
        encoded = {"pictures": len(pictures), "views": pictures.rows, "places": pictures.places or "all"}
        return values | quality | encoded

    def minutes_left(self, stage: str) -> float:
        """The rest of max_minutes, for the last stage; 0: no limit."""
        if not self.settings.max_minutes:
            return 0.0
        return max(MIN_MINUTES, self.settings.max_minutes - self.clock.spent_outside(stage))

    def gpt_knows_tokens(self) -> bool:
        """Whether the base's transformer was trained on the tokens that it gets now."""
        if self.settings.size != "base" or not transformer_matches(self.base):
            return False
        return self.settings.stage == "transformer" or self.stage_record("vqgan")["tokens_kept"]

    def sample_prompts(self) -> list[str]:
        prompts = prompts_of(self.settings.sample_prompts)
        for prompt in prompts if self.is_first else ():
            if lost := self.networks.clip.tokenize.left_out(prompt):
                log.warning("a sample prompt is longer than CLIP reads; its end is left out: %r", lost)
        return prompts

    def encode_train_pictures(self) -> EncodedPictures:
        files, folder = self.picture_files(self.train_paths), self.work / "encoded"
        return encode_train_pictures(files, self.plan.views, self.networks, folder, self.settings)

    def encode_held_back(self) -> EncodedPictures:
        files, folder = self.picture_files(self.held_back_paths), self.work / "encoded"
        return encode_held_back(files, self.networks, folder, self.settings.max_minutes)

    def fit(
        self,
        name: str,
        trainer: VQGANTrainer | GPTTrainer,
        samples: Endless,
        held_back: PictureFiles | EncodedPictures,
        minutes: float,
        grids: Callback,
        fine_tunes: bool,
    ) -> dict[str, object]:
        settings, machine, folder = self.settings, replace(self.machine, max_minutes=minutes), self.work / name
        advice = remedy(settings, self.plan)
        planned = Reach(name, 0, trainer.config.steps, settings.max_minutes, fine_tunes, advice)
        forecast = Forecast(minutes, planned)
        callbacks, seed = [forecast, grids, self.clock], settings.seed
        values = fit(name, trainer, samples, held_back, folder, seed=seed, machine=machine, callbacks=callbacks)
        values |= {"planned_steps": planned.planned, "fine_tunes": fine_tunes}
        return values | ({"forecast_steps": forecast.reach.steps} if forecast.reach else {})

    def export(self, records: dict[str, dict[str, object]], was_finished: bool) -> None:
        """Writes the model folder, weights.tar and report.html."""
        if was_finished:
            log_finished(self.out, records)
        record = self.record(records) | earlier_record(self.out / "model", records)
        save_networks(self.networks, self.out / "model", record)
        pack(self.out / "model", self.out / "weights.tar")
        write_report(self.out / "report.html", self.work, record)
        for sentence in record["warnings"]:
            log.warning(sentence)
        log.info("weights: %s  report: %s", self.out / "weights.tar", self.out / "report.html")
        if self.settings.stage == "vqgan" and not self.gpt_knows_tokens():
            log.warning("the transformer does not know these tokens yet: train stage transformer from these weights")

    def record(self, stages: dict[str, dict[str, object]]) -> dict[str, object]:
        held_back, minutes = len(self.held_back_paths), self.clock.minutes
        return training_record(self.settings, self.plan, self.pictures, held_back, stages, minutes)
