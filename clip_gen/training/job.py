"""Pictures in, a model folder and a weights tar out.

    python -m clip_gen train photos.zip --out weights

The folder `out` holds weights.tar, model/, report.html, and work/, from which the same command resumes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import inf
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader, Subset

from clip_gen.data.archive import Pictures, check_outside, fingerprint, unpack
from clip_gen.data.manifest import unpacked
from clip_gen.files import PARTIAL, folder_lock, remove_leftovers, sha256_of, write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.training.callbacks import Clock
from clip_gen.training.checkpoints import PREVIOUS, find_checkpoint, has_checkpoint
from clip_gen.training.datasets import EncodedPictures, Endless, PictureFiles, Views, enough_places
from clip_gen.training.encoding import encode_embeddings, encode_tokens
from clip_gen.training.fit import Machine, fit
from clip_gen.training.folder import check_training_folder, own_training_folder
from clip_gen.training.gpt_trainer import GPTTrainer, start_from_codes
from clip_gen.training.grids import ReconstructionGrids, SampleGrids
from clip_gen.training.loading import loader_with_workers
from clip_gen.training.losses import colour_errors, decibels, mean_errors, squared_errors
from clip_gen.training.neighbours import find_neighbours
from clip_gen.training.perceptual import chosen_lpips
from clip_gen.training.plan import MODEL_SIZES, Plan, TrainSettings, plan, prompts_of
from clip_gen.training.processes import announce, wait_for, wait_for_announcement
from clip_gen.training.progress import Forecast, Reach, enough_minutes
from clip_gen.training.report import write_report
from clip_gen.training.vqgan_trainer import VQGANTrainer
from clip_gen.weights.default_model import default_model
from clip_gen.weights.model_folder import (
    FILES,
    ModelFolderError,
    Networks,
    build,
    load_base,
    load_discriminator,
    load_part,
    load_record,
    save_networks,
    save_part,
    transformer_matches,
)
from clip_gen.weights.tarball import pack, resolve_weights

log = logging.getLogger(__name__)

MOST_HELD_BACK = 512
RECORD = "record.json"  # of a stage that is finished
TIME_LIMIT = "max_minutes"  # the file that says how many there were when the views were encoded
VQGAN_TIME = 0.2  # of max_minutes; the transformer gets the rest
LEAST_MINUTES = 0.1  # for the transformer, whatever came before it
ENCODING_TIME = 0.05  # for views of the pictures, first one of each; those it is not enough for are left out
# Of reconstructions, and by how much they must be nearer than the picture's mean colour alone: pale pictures are never
# far off. Published VQGANs of 16 by 16 tokens reach 20 dB on photographs like those they know.
GOOD_DB, BETTER_DB = 18.0, 6.0
JUDGED_BY = 64  # pictures


@dataclass(frozen=True)
class Quality:
    """How well a VQGAN reconstructs some pictures: its PSNR in dB, and that of each picture's mean colour alone."""

    psnr: float
    mean_colour_psnr: float

    @property
    def good(self) -> bool:
        return self.psnr >= GOOD_DB and self.psnr - self.mean_colour_psnr >= BETTER_DB

    def __str__(self) -> str:
        return (
            f"the base's VQGAN reconstructs these pictures at {self.psnr:.1f} dB, their mean colour alone is at "
            f"{self.mean_colour_psnr:.1f}"
        )


class Training:
    """One training in its folder."""

    def __init__(self, images: Path, out: Path, settings: TrainSettings, machine: Machine | None = None):
        self.settings, self.machine, self.out, self.work = settings, machine or Machine(), out, out / "work"
        settings.check()
        self.machine.check()
        if not rank_zero_only.rank:  # the others would see what the first has begun to write
            check_training_folder(out)
        check_outside(images, out)
        began = time.monotonic()
        self.base = base = resolve_weights(settings.base or default_model(os.environ.get("COG_WEIGHTS"))[0])
        self.networks: Networks = load_base(base)
        if rank_zero_only.rank:
            # What an earlier start left, the first process may replace until then.
            wait_for_announcement(self.work / "ready")
        else:
            own_training_folder(out)
        with self._alone():
            self.pictures = self._pictures(images)
            self.on_gpu = self._on_gpu()
            self.plan: Plan = plan(settings, self.networks.config, len(self.pictures.paths), on_gpu=self.on_gpu)
            self.machine = self.machine.with_gpus_for(self.plan.vqgan.batch_size, self.plan.transformer.batch_size)
            self._same_settings()
            self._remove_left_over()
            self.clock = Clock(self.work, self.stages, began)
            self._continue_last_stage()
            self.learnt, self.held_back = self._split()
            self._forget_few_views()
            if not rank_zero_only.rank:
                self.ready = announce(self.work / "ready")
        if settings.size != "base":
            torch.manual_seed(settings.seed)
            self.networks = build(self.plan.model)
            for part in ("clip", "bridge"):
                load_part(getattr(self.networks, part), base / f"{part}.safetensors")
        if not self.networks.bridge.text_mean.any():
            # Nobody measured it, as of a model that was imported; without it a shift leads anywhere.
            if settings.mean_shift:
                log.info("the base's texts have no mean, so prompts stay where they are (mean_shift 0)")
            unmoved = replace(self.plan.model, bridge=replace(self.plan.model.bridge, mean_shift=0.0))
            self.plan = replace(self.plan, model=unmoved)
        self.networks = replace(self.networks, config=self.plan.model)
        self.networks.bridge.config = self.plan.model.bridge
        self.networks.clip.requires_grad_(False)

    @property
    def stages(self) -> tuple[str, ...]:
        return {"both": ("vqgan", "gpt"), "vqgan": ("vqgan",), "transformer": ("gpt",)}[self.settings.stage]

    def _alone(self) -> AbstractContextManager[None]:
        """No other training works in the folder meanwhile; ValueError when one does."""
        busy = f"{self.out} is in use by another training; wait for it to end, or name another folder"
        return nullcontext() if rank_zero_only.rank else folder_lock(self.work, busy)

    def _remove_left_over(self) -> None:
        """Files and folders that were being written when a training here was killed."""
        if not rank_zero_only.rank:
            for folder in (self.out, *(path.parent for path in self.work.rglob(f"{PARTIAL}*"))):
                remove_leftovers(folder, seconds=0)

    def _pictures(self, images: Path) -> Pictures:
        """What is in `images`, unpacked once; ValueError when the folder holds a training on something else.

        Pictures that no training began with, because it was refused its settings, are unpacked anew.
        """
        folder, source = self.work / "pictures", self.work / "source"
        if rank_zero_only.rank:
            return unpacked(folder)
        begun, before = (self.work / "settings.json").is_file(), source.read_text() if source.is_file() else None
        found = fingerprint(images) if images.exists() else before or ""
        if begun and before not in (None, found):
            raise ValueError(
                f"{images} is not what it was when the training in {self.out} began; name another folder for "
                "a training on these pictures, or put the earlier ones back to go on"
            )
        if folder.is_dir():
            if begun or before == found:
                return unpacked(folder)
            source.unlink(missing_ok=True)
            shutil.rmtree(folder)
        pictures = unpack(images, folder)
        write_text_atomic(source, found)
        return pictures

    def _on_gpu(self) -> bool:
        """Whether it is planned for a GPU, which a training taken up again on another machine still is."""
        path = self.work / "settings.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        return before.get("on_gpu", torch.cuda.is_available())

    def _same_settings(self) -> None:
        """Notes what this training was told; ValueError when the folder holds one that was told otherwise."""
        if rank_zero_only.rank:
            return
        path = self.work / "settings.json"
        told = asdict(self.settings) | {"base": contents_of(self.base), "on_gpu": self.on_gpu}
        for name in ("max_minutes", "sample_prompts"):  # which may change: how long to train, and the report
            told.pop(name)
        if path.is_file():
            # A setting that an earlier version of this program did not know was what it is now by default.
            before = asdict(TrainSettings()) | json.loads(path.read_text())
            if before.pop("base") != told["base"]:
                raise ValueError(
                    f"{self.out} holds a training from another base than {self.settings.base or self.base}; "
                    "give the same model to go on with it, or name another folder"
                )
            for name in told.keys() & before.keys():
                value = told[name]
                if before[name] != value:
                    raise ValueError(
                        f"{self.out} holds a training with {name} {before[name]!r}, not {value!r}; "
                        "say the same to go on with it, or name another folder"
                    )
        write_text_atomic(path, json.dumps(told, indent=1))

    def _split(self) -> tuple[list[Path], list[Path]]:
        """The pictures to learn from, and a twentieth to watch the losses on; at least 2, at most 512."""
        paths = self.pictures.paths
        count = min(MOST_HELD_BACK, max(2, len(paths) // 20))
        shuffled = [paths[i] for i in np.random.default_rng(self.settings.seed).permutation(len(paths))]
        return shuffled[count:], shuffled[:count]

    def _continue_last_stage(self) -> None:
        """The last stage is trained further when time ended it and there is more of it now. Not one before it: the
        next one has learnt its tokens.
        """
        folder, minutes = self.work / self.stages[-1], self.settings.max_minutes
        record = folder / RECORD
        values = json.loads(record.read_text()) if record.is_file() and not rank_zero_only.rank else {}
        longer = values.get("ended_by") == "time" and (minutes == 0 or minutes > values["max_minutes"])
        if longer and find_checkpoint(folder):
            log.info("%s: max_minutes ended it at step %d; it continues", self.stages[-1], values["steps"])
            record.unlink()

    def _forget_few_views(self) -> None:
        """Views that time cut short are encoded again when there is more of it, until the transformer has begun."""
        folder = self.work / "encoded"
        arrays = [folder / f"{name}-learnt.npy" for name in ("embeddings", "tokens")]
        if rank_zero_only.rank or has_checkpoint(self.work / "gpt"):
            return
        limit, minutes = folder / TIME_LIMIT, self.settings.max_minutes
        if limit.is_file() and 0 < minutes <= float(limit.read_text()):
            return
        whole = len(self.learnt) * self.plan.views
        if any(path.is_file() and len(np.load(path, mmap_mode="r")) < whole for path in arrays):
            for path in (*arrays, limit, folder / "neighbours-learnt.npy"):
                path.unlink(missing_ok=True)

    def files(self, paths: Sequence[Path]) -> PictureFiles:
        settings, resolution = self.settings, self.plan.model.vqgan.resolution
        crop = 0.8 if settings.crop else 1.0
        return PictureFiles(paths, resolution, crop, settings.flip, settings.shift)

    def run(self) -> Path:
        """Trains what the settings say, and returns the weights tar; ValueError where another process does so."""
        with self._alone():
            return self._run()

    def _run(self) -> Path:
        finished = all((self.work / name / RECORD).is_file() for name in self.stages)
        if not rank_zero_only.rank:
            self.measure_pictures()
        records = {name: self.part(name) for name in self.stages}
        tar = self.out / "weights.tar"
        if rank_zero_only.rank:
            return tar
        if finished:
            self._say_finished(records)
        record = self.record(records) | self.earlier_record(records)
        save_networks(self.networks, self.out / "model", record)
        pack(self.out / "model", tar)
        write_report(self.out / "report.html", self.work, record)
        for sentence in record["warnings"]:
            log.warning(sentence)
        log.info("weights: %s  report: %s", tar, self.out / "report.html")
        known = self.settings.stage != "vqgan" or (records["vqgan"]["tokens_kept"] and transformer_matches(self.base))
        if not known:
            log.warning("the transformer does not know these tokens yet: train stage transformer from these weights")
        return tar

    def _say_finished(self, records: dict[str, dict[str, object]]) -> None:
        last = records[self.stages[-1]]
        more = f"give more than {last['max_minutes']:g} max_minutes, or " if last.get("ended_by") == "time" else ""
        log.info(
            "%s holds a finished training (%s), so nothing is trained. To train further, %sstart a training in another "
            "folder with base=%s",
            self.out,
            ", ".join(f"{name}: {values['steps']} steps" for name, values in records.items()),
            more,
            self.out / "weights.tar",
        )

    def part(self, name: str) -> dict[str, object]:
        """Trains a stage unless it is finished; leaves its network loaded as it will ship."""
        folder, network = self.work / name, getattr(self.networks, name)
        record, weights = folder / RECORD, folder / f"{name}.safetensors"
        if not record.is_file():
            values = getattr(self, f"train_{name}")(folder)
            if not rank_zero_only.rank:
                (folder / PREVIOUS).unlink(missing_ok=True)
                save_part(network.cpu(), weights)
                write_text_atomic(record, json.dumps(values | {"max_minutes": self.settings.max_minutes}))
                self.clock.save()
        wait_for(record)
        load_part(network, weights)
        network.eval().requires_grad_(False)
        return json.loads(record.read_text())

    def train_vqgan(self, folder: Path) -> dict[str, object]:
        seed, held_back = self.settings.seed, self.files(self.held_back)
        keeps = self.keeps_tokens(folder / "tokens.json")
        vqgan = self.networks.vqgan.train().requires_grad_(True)
        compares = self.plan.vqgan_loss.perceptual > 0
        lpips = chosen_lpips(folder, vqgan.config.resolution) if compares else None
        fitting, loss = self.plan.vqgan, self.plan.vqgan_loss
        torch.manual_seed(seed)  # for a discriminator that starts anew
        trainer = VQGANTrainer(
            vqgan,
            fitting,
            loss,
            self.networks.clip,
            lpips,
            discriminator=load_discriminator(self.base) if self.settings.size == "base" else None,
            decoder_alone=keeps,
        )
        minutes = self.settings.max_minutes * VQGAN_TIME
        if self.settings.stage == "vqgan":
            minutes = self.minutes_left("vqgan")
        samples = Endless(self.files(self.learnt), seed)
        grids = ReconstructionGrids(held_back, folder)
        values = self.fit("vqgan", trainer, samples, held_back, folder, minutes, grids, fine_tunes=keeps)
        values |= {"tokens_kept": keeps}
        return values | ({"perceptual_loss": "CLIP" if lpips is None else "LPIPS"} if compares else {})

    def keeps_tokens(self, decision: Path) -> bool:
        """Whether only the decoder trains, so that tokens keep the meaning that the base's transformer learnt.

        The first process decides and writes the decision to a file, for the others and for a resumed training.
        """
        settings = self.settings
        if settings.tokens != "auto" or settings.size != "base" or not transformer_matches(self.base):
            return settings.tokens == "keep"
        if rank_zero_only.rank:
            wait_for(decision)
        if decision.is_file():
            return json.loads(decision.read_text())
        quality = self.base_quality()
        keeps = quality.good
        log.info("%s: %s", quality, "its tokens are kept and its decoder learns" if keeps else "it learns other tokens")
        decision.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(decision, json.dumps(keeps))
        return keeps

    @torch.no_grad()
    def base_quality(self) -> Quality:
        """How well the base's VQGAN reconstructs these pictures, by JUDGED_BY of them."""
        vqgan, errors = self.networks.vqgan, []
        with on_device(vqgan) as device:
            for batch in DataLoader(self.files([*self.held_back, *self.learnt][:JUDGED_BY]), 16):
                images = from_bytes(batch.to(device))
                decoded = vqgan.decode(vqgan.encode(images))
                errors.append(torch.stack([squared_errors(decoded, images), colour_errors(images)]).cpu())
        reached, colour = decibels(mean_errors(torch.cat(errors, dim=1))).tolist()
        return Quality(reached, colour)

    def check_base(self) -> dict[str, float]:
        """The quality of the base's VQGAN, which stage transformer keeps as it is; warns where it is poor."""
        if rank_zero_only.rank:
            return {}
        quality = self.base_quality()
        if quality.good:
            log.info("%s", quality)
        else:
            log.warning("%s, and drawn pictures look no better; give stage both to train the VQGAN too", quality)
        return {name: round(value, 2) for name, value in asdict(quality).items()}

    def train_gpt(self, folder: Path) -> dict[str, object]:
        settings, networks = self.settings, self.networks
        quality = self.check_base() if settings.stage == "transformer" else {}
        learnt, held_back = self.encoded("learnt"), self.encoded("held_back")
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
        minutes = self.minutes_left("gpt")
        grids = SampleGrids(networks, held_back, self.sample_prompts(), folder, settings.seed)
        samples = Endless(learnt, settings.seed)
        values = self.fit("gpt", trainer, samples, held_back, folder, minutes, grids, fine_tunes=self.knows_tokens())
        return values | quality | {"pictures": len(learnt), "views": learnt.rows, "places": learnt.places or "all"}

    def minutes_left(self, stage: str) -> float:
        """Of max_minutes, for the last stage of this training; 0: no limit."""
        if not self.settings.max_minutes:
            return 0.0
        return max(LEAST_MINUTES, self.settings.max_minutes - self.clock.spent_outside(stage))

    def sample_prompts(self) -> list[str]:
        prompts = prompts_of(self.settings.sample_prompts)
        for prompt in () if rank_zero_only.rank else prompts:
            if lost := self.networks.clip.tokenize.left_out(prompt):
                log.warning("a sample prompt is longer than CLIP reads; its end is left out: %r", lost)
        return prompts

    def fit(
        self,
        name: str,
        trainer: VQGANTrainer | GPTTrainer,
        samples: Endless,
        held_back: PictureFiles | EncodedPictures,
        folder: Path,
        minutes: float,
        grids: Callback,
        fine_tunes: bool,
    ) -> dict[str, object]:
        machine, seed = replace(self.machine, max_minutes=minutes), self.settings.seed
        planned = Reach(name, 0, trainer.config.steps, self.settings.max_minutes, fine_tunes, self.remedy())
        forecast = Forecast(minutes, planned)
        callbacks = [forecast, grids, self.clock]
        values = fit(name, trainer, samples, held_back, folder, seed=seed, machine=machine, callbacks=callbacks)
        values |= {"planned_steps": planned.planned, "fine_tunes": fine_tunes}
        return values | ({"forecast_steps": forecast.reach.steps} if forecast.reach else {})

    def knows_tokens(self) -> bool:
        """Whether the base's transformer knows the tokens that it is to learn from."""
        if self.settings.size != "base" or not transformer_matches(self.base):
            return False
        record = self.work / "vqgan" / "record.json"
        return self.settings.stage == "transformer" or json.loads(record.read_text())["tokens_kept"]

    def remedy(self) -> str:
        """What helps besides more minutes, as the end of a sentence."""
        size, laptop = self.settings.size, MODEL_SIZES["laptop"][0]
        if size == "laptop":
            return ", or a smaller resolution"
        if size != "base":
            return ", or a smaller size"
        return ", or size laptop" if self.plan.model.vqgan.resolution > laptop.resolution else ""

    def shortages(self, stages: dict[str, dict[str, object]]) -> list[str]:
        """What the stages had too little time for, a sentence each."""
        found = []
        for name, values in stages.items():
            minutes = values.get("max_minutes", self.settings.max_minutes)
            steps, planned = values["steps"], values.get("planned_steps", 0)  # 0: of an earlier version
            reach = Reach(name, steps, planned, minutes, values.get("fine_tunes", False), self.remedy())
            if minutes and values.get("ended_by") == "time" and reach.too_few:
                # The stages before the last are not trained further with more minutes.
                where = "" if name == list(stages)[-1] else ", in another folder"
                found.append(f"{name}: its time ended after {steps:,} of {planned:,} steps, {reach.advice()}{where}")
            pictures = values.get("pictures", len(self.learnt))
            if pictures < len(self.learnt):
                found.append(f"{self._few_pictures(pictures)}, in another folder")
        return found

    def _few_pictures(self, count: int) -> str:
        wanted, limit = len(self.learnt), self.work / "encoded" / TIME_LIMIT
        minutes = float(limit.read_text()) if limit.is_file() else self.settings.max_minutes
        return (
            f"gpt: its time sufficed to encode {count:,} of {wanted:,} pictures, and it learns from no others; give "
            f"max_minutes of about {enough_minutes(minutes, count, wanted)}"
        )

    def encoded(self, name: str) -> EncodedPictures:
        """Every picture as several crops and their flips, through CLIP and VQGAN once; as many as there is time for."""
        settings, folder, views = self.settings, self.work / "encoded", self.plan.views
        files = self.files(getattr(self, name))
        pictures = Views(files, views, settings.seed) if name == "learnt" and views > 1 else files
        seconds = 60 * ENCODING_TIME * settings.max_minutes or inf
        began = time.monotonic()
        # Not compiled, for a training taken up again here has nothing compiled, and is to find the same tokens.
        with torch.compiler.set_stance("force_eager"):
            path = folder / f"embeddings-{name}.npy"
            embeddings = encode_embeddings(pictures, self.networks.clip, path, seconds / 2)
            left = seconds - (time.monotonic() - began)
            embedded = Subset(pictures, range(len(np.load(embeddings, mmap_mode="r"))))
            tokens = encode_tokens(embedded, self.networks.vqgan, folder / f"tokens-{name}.npy", left)
        if name == "held_back":
            return EncodedPictures(embeddings, tokens)
        if not rank_zero_only.rank:
            self.clock.save()
            if not (folder / TIME_LIMIT).is_file():
                write_text_atomic(folder / TIME_LIMIT, str(settings.max_minutes or inf))
        neighbours = None
        if settings.contrast_weight or settings.condition_blur:
            neighbours = find_neighbours(embeddings, len(files), folder / "neighbours-learnt.npy", settings.seed)
        encoded = EncodedPictures(
            embeddings,
            tokens,
            len(files),
            noise=settings.embedding_noise,
            dropout=settings.condition_dropout,
            neighbours=neighbours,
            blur=settings.condition_blur,
            # The second loss looks at whole pictures.
            places=0 if settings.embedding_loss_weight else enough_places(np.load(tokens, mmap_mode="r")),
        )
        if len(encoded) < len(files) and not rank_zero_only.rank:
            log.warning(self._few_pictures(len(encoded)))
        return encoded

    @torch.no_grad()
    def measure_pictures(self) -> None:
        """The bridge's image mean, over these pictures; the text mean stays the base's."""
        loader = loader_with_workers(self.files(self.learnt[:4000]), batch_size=64)
        with on_device(self.networks.clip) as device:
            embeddings = torch.cat([self.networks.clip.encode_image(from_bytes(batch.to(device))) for batch in loader])
        self.networks.bridge.image_mean.copy_(embeddings.mean(dim=0))

    def earlier_record(self, stages: dict[str, dict[str, object]]) -> dict[str, object]:
        """What training.json says of these very stages already, and other settings of this start would change; empty
        where it is of others.
        """
        try:
            record = load_record(self.out / "model")
        except ModelFolderError:
            return {}
        kept = ("settings", "plan", "minutes", "versions") if record.get("stages") == stages else ()
        return {name: record[name] for name in kept if name in record}

    def record(self, stages: dict[str, dict[str, object]]) -> dict[str, object]:
        settings, before = asdict(self.settings), sum(stage["minutes"] for stage in stages.values())
        # The record goes to clients and with the weights: no path of this machine, no secret of a URL.
        settings["base"] = Path(urlsplit(settings["base"]).path).name
        # The limit that the last stage had, should the export have been cut off and started with another.
        settings["max_minutes"] = list(stages.values())[-1].get("max_minutes", settings["max_minutes"])
        return {
            "pictures": self.pictures.as_json() | {"held_back": len(self.held_back)},
            "settings": settings,
            "plan": asdict(self.plan),
            "stages": stages,
            "warnings": self.shortages(stages),
            "minutes": round(max(self.clock.minutes, before), 1),
            "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
        }


def contents_of(model: Path) -> str:
    """What tells a model folder from any other, wherever it lies."""
    digests = [f"{name} {sha256_of(model / name)}" for name in FILES if (model / name).is_file()]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
