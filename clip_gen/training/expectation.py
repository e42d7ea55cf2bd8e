"""What to expect of a training, before it starts: pictures, base, sizes, steps, time, memory and disk."""

from __future__ import annotations

import copy
import logging
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import Dataset

from clip_gen.config import GPTConfig
from clip_gen.files import folder_lock
from clip_gen.hardware import available_memory, choose_device, on_device
from clip_gen.images import from_bytes
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.training.base import settle_base
from clip_gen.training.datasets import Batches, Endless, loader_with_workers
from clip_gen.training.decisions import uses_lpips
from clip_gen.training.encoding import MAX_NEIGHBOURS
from clip_gen.training.fit import Machine, lightning_precision
from clip_gen.training.folder import claim
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.lora import choose_parameters
from clip_gen.training.stage import Stage
from clip_gen.training.vqgan_trainer import VQGANTrainer

if TYPE_CHECKING:
    from clip_gen.training.job import Training

log = logging.getLogger(__name__)

TIMED_STEPS, MAX_SECONDS = 10, 60  # of a stage
SHORT = 100  # steps of a stage that is not worth the time
# For each trained parameter: two checkpoints with weights, their averages and moments, and best.ckpt and its successor.
CHECKPOINT_BYTES = 2 * 16 + 2 * 4
WEIGHTS_BYTES = 2 * 2  # for each parameter: a folder and a tar, in float16


def dry_run(training: Training) -> None:
    """Logs what to expect of training.run(), and leaves the unpacked pictures, which that finds."""
    training.check()
    training.load_base()
    claim(training.out)
    with folder_lock(training.work, f"{training.out} is in use by another training; wait for it to end"):
        training.pictures = training.unpack_pictures()
        settle_base(training, is_dry=True)
        if training.choice and (files := training.choice.files()):
            log.info("to download: %s", ", ".join(map(str, files)))
            log.info("time, memory and disk can be told when that is done: %s", training.choice.commands())
            return
        training.plan_stages(is_dry=True)
        training.build_networks()
        log_expectation(training)


def log_expectation(training: Training) -> float:
    """Logs a line for each thing to expect. Takes up to two minutes for the timed steps.

    Returns the minutes that encoding and stage 2 take; 0 if they were not timed.
    """
    log.info("timing up to %d steps of each stage, for a minute each at most", TIMED_STEPS)
    seconds = _timed(training)
    log.info("what to expect:")
    lines = {
        "pictures": f"{training.pictures.summary()}; {len(training.held_back_paths)} are held back to measure on",
        "squares": training.plan.squares,
        "base": training.choice.in_words() if training.choice else training.base.name,
        "sizes": _sizes(training),
        **_stages(training, seconds),
        "memory": _memory(),
        "disk": _disk(training),
    }
    for name, text in lines.items():
        log.info("  %-9s %s", name, text)
    return _seconds_of_stage_2(training, seconds) / 60


def _sizes(training: Training) -> str:
    vqgan, gpt, networks = training.plan.model.vqgan, training.plan.model.gpt, training.networks
    return (
        f"{vqgan.resolution} pixels, {vqgan.grid} x {vqgan.grid} tokens of {vqgan.codebook_size:,} codes; VQGAN of "
        f"{_rounded(_count(networks.vqgan))} parameters; transformer of {gpt.n_layer} layers of width {gpt.n_embd}, "
        f"{_rounded(_count(networks.gpt))}"
    )


def _stages(training: Training, seconds: dict[str, float]) -> dict[str, str]:
    """A line for each step of the training, and for all of them if they were timed."""
    plan, lines, total = training.plan, {}, 0.0
    rows = training.pictures.estimated or len(training.train_paths) * plan.views
    for name, title in (("vqgan", "stage 1"), ("gpt", "stage 2")):
        if name not in training.stages:
            continue
        config = plan.vqgan if name == "vqgan" else plan.transformer
        most = "at most " if config.patience else ""
        lines[title] = f"{most}{config.steps:,} steps of {config.batch_size} pictures"
        if not config.steps:
            lines[title] = "left out: the base's VQGAN reconstructs the pictures very well"
        if name == "gpt":
            lines[title] += f", after encoding {rows:,} views"
            if plan.lora_rank:
                lines["LoRA"] = _lora(training)
        if name in seconds:
            duration = _seconds_of_stage_2(training, seconds) if name == "gpt" else config.steps * seconds[name]
            total += duration
            lines[title] += f": about {_duration(duration)}, at {seconds[name]:.2g} s a step"
    if len(seconds) > 1:
        limit = training.settings.max_minutes
        ends = f"; max_minutes ends it after {_duration(60 * limit)}" if 0 < 60 * limit < total else ""
        lines["in all"] = f"about {_duration(total)}{ends}"
    return lines


def _lora(training: Training) -> str:
    gpt, rank = copy.deepcopy(training.networks.gpt), training.plan.lora_rank
    choose_parameters(gpt, rank, training.tokens.known)
    trained = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
    return (
        f"trains {_rounded(trained)} parameters, additions of rank {rank} to the transformer's "
        f"{_rounded(_count(training.networks.gpt))}, since there are few pictures; lora=off trains all"
    )


def _seconds_of_stage_2(training: Training, seconds: dict[str, float]) -> float:
    """With encoding; 0 if it was not timed."""
    if "gpt" not in seconds:
        return 0.0
    rows = len(training.train_paths) * training.plan.views
    return training.plan.transformer.steps * seconds["gpt"] + rows * seconds["encoding"]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1.0, seconds / 60):.0f} min"


def _rounded(count: int) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"


def _size(count: float) -> str:
    """Of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _memory() -> str:
    """The peak until now, with the timed steps, and what is free."""
    device = choose_device()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident_peak()
    return f"{_size(peak)} at the peak until now, {_size(available_memory(device))} free"


def _resident_peak() -> int:
    """Bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _disk(training: Training) -> str:
    """What the folder of the training takes at most; the unpacked pictures are there already."""
    networks, model = training.networks, training.plan.model
    parameters = {name: _count(getattr(networks, name)) for name in ("clip", "vqgan", "gpt")}
    trained = [parameters[name] for name in training.stages]
    a_row = 2 * model.clip.embed_dim + 2 * model.gpt.block_size + 4 * MAX_NEIGHBOURS
    rows = training.pictures.estimated or len(training.train_paths) * training.plan.views
    encoded = rows * a_row if "gpt" in training.stages else 0
    pictures = sum(path.stat().st_size for path in training.pictures.paths)
    needed = pictures + encoded + CHECKPOINT_BYTES * max(trained) + WEIGHTS_BYTES * sum(parameters.values())
    return f"{_size(needed)} in all, {_size(shutil.disk_usage(training.out).free)} free"


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _timed(training: Training) -> dict[str, float]:
    """Seconds for a step of each stage, and for encoding a view; of no stage that is short."""
    plan, seconds = training.plan, {}
    long = [name for name, fit in (("vqgan", plan.vqgan), ("gpt", plan.transformer)) if fit.steps >= SHORT]
    with torch.random.fork_rng():
        if "vqgan" in long and "vqgan" in training.stages:
            samples = Endless(training.picture_files(training.train_paths), training.settings.seed)
            seconds["vqgan"] = seconds_per_step(_vqgan_stage(training), samples, training.machine)
        if "gpt" in long and "gpt" in training.stages:
            config = replace(plan.transformer, steps=TIMED_STEPS, compile=False)
            gpt = copy.deepcopy(training.networks.gpt).train()
            choose_parameters(gpt, plan.lora_rank, training.tokens.known)
            samples = RandomTokens(plan.model.gpt)
            seconds["gpt"] = seconds_per_step(GPTTrainer(gpt, config), samples, training.machine)
            seconds["encoding"] = _seconds_per_view(training)
    return seconds


def _vqgan_stage(training: Training) -> VQGANTrainer:
    """Of ten steps, so it uses its discriminator in half of them, as the whole stage does."""
    plan, networks = training.plan, training.networks
    vqgan = copy.deepcopy(networks.vqgan).train().requires_grad_(True)
    features = FrozenLPIPS() if uses_lpips(vqgan.config.resolution) else networks.clip  # as fast with any weights
    return VQGANTrainer(vqgan, replace(plan.vqgan, steps=TIMED_STEPS, compile=False), plan.vqgan_loss, features)


class RandomTokens(Dataset):
    """Samples like those of EncodedPictures, for timing."""

    def __init__(self, config: GPTConfig):
        self.config = config

    def __getitem__(self, number: int) -> tuple[Tensor | bool, ...]:
        rng, config = np.random.default_rng(number), self.config
        embedding = torch.from_numpy(rng.standard_normal(config.embed_dim, np.float32))
        tokens = torch.from_numpy(rng.integers(config.codebook_size, size=config.block_size))
        return embedding, tokens, False, embedding, embedding


class _Stopwatch(Callback):
    """The time of each step's end."""

    def __init__(self):
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.times.append(time.monotonic())
        trainer.should_stop = len(self.times) > 1 and self.times[-1] - self.times[0] > MAX_SECONDS


def seconds_per_step(stage: Stage, samples: Dataset, machine: Machine) -> float:
    """The mean of ten steps on one device, without the first, which is slower; of fewer if they take over a minute.

    The stage's weights change. Each of several devices gets its share of a batch.
    """
    watch, devices = _Stopwatch(), int(machine.devices) if machine.devices.isdecimal() else 1
    batch_size = max(1, stage.config.batch_size // (devices * machine.nodes))
    with tempfile.TemporaryDirectory() as folder:
        trainer = replace(machine, devices="1", nodes=1, strategy="auto").trainer(
            max_steps=TIMED_STEPS,
            precision=lightning_precision(stage.config),
            gradient_clip_val=1.0,
            callbacks=[watch],
            limit_val_batches=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(stage, loader_with_workers(samples, batch_sampler=Batches(TIMED_STEPS, batch_size)))
    return (watch.times[-1] - watch.times[0]) / (len(watch.times) - 1)


@torch.no_grad()
def _seconds_per_view(training: Training) -> float:
    """For encoding one."""
    networks, some = training.networks, training.picture_files(training.train_paths[:8])
    pictures = torch.stack([torch.from_numpy(some[index]) for index in range(len(some))])
    with on_device(networks.clip, networks.vqgan) as device:
        began = time.monotonic()
        images = from_bytes(pictures.to(device))
        networks.clip.encode_image(images)
        networks.vqgan.encode(images).cpu()
        return (time.monotonic() - began) / len(some)
