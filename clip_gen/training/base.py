"""What a training with base auto starts from: the model that predicts, or published weights.

A bundled model's CLIP knows its own world only. Trained on other pictures with it, a model reconstructs them, but no
prompt about them can work. So the model that predicts is the base only if its CLIP was trained on such pictures.
"""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from clip_gen.config import GPTConfig
from clip_gen.data.limits import reason_of
from clip_gen.files import MODULE, atomic_folder, write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.training.datasets import PictureFiles
from clip_gen.training.folder import saved_settings
from clip_gen.training.plan import MODEL_SIZES, TrainSettings
from clip_gen.weights import pull
from clip_gen.weights.model_folder import (
    CONFIG,
    DISCRIMINATOR,
    Networks,
    load_base,
    load_config,
    load_record,
    write_description,
)

if TYPE_CHECKING:
    from clip_gen.training.job import Training

log = logging.getLogger(__name__)

DECISION = "base.json"  # in the folder work

PUBLISHED_VQGAN = "imagenet-f16-1024"
JUDGED_PICTURES = 64  # on which a base is measured
# Measured in docs/training.md. The nearest remembered picture has a cosine of 0.8 to 1 on the world of emoji, of 0.71
# to 0.75 on the drawings alone and on those of other artists, and of 0.65 to 0.7 on photographs.
KNOWN_COSINE = 0.78
# For a model without a memory: the CLIP of shapes differs by 0.01 nats on its world, by up to 0.08 on a part of it such
# as one colour, and by 0.4 to 0.9 on other pictures.
STRANGE_NATS = 0.1
# The mean cosine is 0.5 to 0.65 on a bundled CLIP's own world, and 0.95 or more on pictures that it cannot tell apart.
ALIKE_COSINE = 0.9


def settle_base(training: Training, is_dry: bool = False) -> None:
    """With base auto: keeps the model that predicts, or loads published weights in its place. Another base is kept,
    with a warning if its CLIP does not know the pictures.

    is_dry: downloads and writes nothing, so files of the choice may be missing. A training that resumes keeps its base.
    """
    if not training.settings.chooses_base:
        training.choice = _judged(training)
        return
    settings, decision = training.settings, training.work / DECISION
    has_begun = bool(saved_settings(training.out))
    if not training.is_first or (has_begun and decision.is_file()):
        choice = Choice(**json.loads(decision.read_text()))
    else:
        choice = choose_base(training.networks, _sample(training), settings, training.on_gpu())
        if not is_dry:
            choice = download(choice, settings)
            write_text_atomic(decision, json.dumps(asdict(choice), indent=1))
    training.choice = choice
    choice.log()
    if choice.clip and not choice.files():
        training.settings = replace(settings, size=choice.size)
        training.base = chosen_folder(choice, training.work / "base", training.on_gpu())
        training.networks = load_base(training.base, needs_vqgan=bool(choice.vqgan))


def _judged(training: Training) -> Choice | None:
    """The base that the settings name, if its CLIP does not know the pictures."""
    if not training.is_first or training.settings.stage == "vqgan":
        return None
    known = measure_acquaintance(training.networks, _sample(training))
    choice = Choice(training.networks.config.name, **asdict(known))
    if choice.is_known:
        return None
    log.info("%s", _measured(choice))
    warning = (
        f"the CLIP of {choice.model} does not know such pictures: the trained model will reconstruct them, but prompts "
        "about them cannot be expected to work; base=auto takes OpenAI's CLIP for them"
    )
    log.warning(warning)
    return replace(choice, warning=warning)


def _sample(training: Training) -> PictureFiles:
    return PictureFiles(training.sample_of_pictures(), training.networks.config.vqgan.resolution)


@dataclass(frozen=True)
class Acquaintance:
    """How well a CLIP knows some pictures.

    remembered: for a model with a memory, the cosine of a picture's embedding with the nearest remembered one, less
    the mean of both; the median over the pictures. nats: how far the activations in its image encoder are from
    those in its training, as the KL divergence of normal distributions, mean over all channels of its batch norms;
    0 if it has none, or was trained on all kinds of pictures as published ones were. cosine: of the embeddings of
    two pictures, in the mean; near 1 it does not tell them apart.
    """

    nats: float
    cosine: float
    remembered: float | None = None


@torch.no_grad()
def measure_acquaintance(networks: Networks, pictures: Dataset) -> Acquaintance:
    """Of the CLIP of a model. pictures: (S, S, 3) uint8, 2 or more."""
    clip, memory = networks.clip, networks.bridge.memory
    # Only the bundled models and those trained from them have a mean of texts. Other CLIPs are published ones.
    knows_all = not networks.bridge.text_mean.any()
    norms = [module for module in clip.clip.visual.modules() if isinstance(module, nn.BatchNorm2d)]
    moments: list[list[Tensor]] = [[] for _ in norms]  # per batch: the means (B, 2, C) of activations and their squares

    def keep_moments(index: int) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].float()
            moments[index].append(torch.stack([x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))], dim=1))

        return hook

    hooks = [norm.register_forward_hook(keep_moments(index)) for index, norm in enumerate(norms)]
    try:
        with on_device(clip) as device:
            batches = (from_bytes(batch.to(device)) for batch in DataLoader(pictures, 32))
            embeddings = torch.cat([clip.encode_image(images) for images in batches]).cpu()
            nats = [_divergence(norm, torch.cat(parts).mean(dim=0)) for norm, parts in zip(norms, moments, strict=True)]
    finally:
        for hook in hooks:
            hook.remove()
    count = len(embeddings)
    cosine = (embeddings.sum(dim=0).square().sum().item() - count) / (count * (count - 1))
    remembered = memory and round(float(memory.nearest_cosine(embeddings).median()), 3)
    return Acquaintance(0.0 if knows_all or not nats else round(sum(nats) / len(nats), 3), round(cosine, 3), remembered)


def _divergence(norm: nn.BatchNorm2d, moments: Tensor) -> float:
    """The KL divergence of activations with these means (2, C) from those in training, mean over the channels."""
    mean, variance = moments[0], (moments[1] - moments[0].square()).clamp(min=1e-8)
    usual = norm.running_var + norm.eps
    ratio = variance / usual
    return (0.5 * (ratio + (mean - norm.running_mean).square() / usual - 1 - ratio.log())).mean().item()


@dataclass(frozen=True)
class Choice:
    """What a training starts from, as work/base.json and training.json have it.

    model: the name of the model that predicts; nats, cosine, remembered: its Acquaintance. clip: one of CLIPS; "":
    that model is the base. vqgan: one of VQGANS; "" beside a clip: new networks of `size`. warning: why no prompt
    can work; "" if they can.
    """

    model: str
    nats: float
    cosine: float
    clip: str = ""
    vqgan: str = ""
    size: str = "base"
    warning: str = ""
    remembered: float | None = None

    @property
    def name(self) -> str:
        """Of the base."""
        parts = [pull.vqgan_folder(self.vqgan).name] if self.vqgan else []
        return " with ".join([*parts, pull.clip_folder(self.clip).name]) if self.clip else self.model

    @property
    def is_known(self) -> bool:
        return self.nats <= STRANGE_NATS if self.remembered is None else self.remembered >= KNOWN_COSINE

    def files(self) -> list[pull.Published]:
        """What has to be downloaded for it."""
        files = []
        if self.clip and not (pull.clip_folder(self.clip) / CONFIG).is_file():
            files.append(pull.CLIPS[self.clip])
        if self.vqgan and not (pull.vqgan_folder(self.vqgan) / CONFIG).is_file():
            files += pull.VQGANS[self.vqgan].values()
        return files

    def commands(self) -> str:
        """What downloads these files by hand."""
        commands = [f"{MODULE} pull clip {self.clip}"]
        return " && ".join(commands + ([f"{MODULE} pull vqgan {self.vqgan}"] if self.vqgan else []))

    def log(self) -> None:
        log.info("base: %s", self.in_words())
        if self.warning:
            log.warning(self.warning)

    def in_words(self) -> str:
        if self.warning:
            return f"{self.model}, whose CLIP does not know such pictures"
        if not self.clip:
            return f"{self.model}, whose CLIP knows such pictures"
        parts = f"the VQGAN {self.vqgan}" if self.vqgan else f"new networks of size {self.size}"
        return f"OpenAI's CLIP {self.clip} and {parts}; the CLIP of {self.model} does not know such pictures"


def choose_base(networks: Networks, pictures: Dataset, settings: TrainSettings, on_gpu: bool) -> Choice:
    """The base for these pictures, (S, S, 3) uint8; downloads nothing. networks: of the model that predicts."""
    choice = Choice(networks.config.name, **asdict(measure_acquaintance(networks, pictures)))
    log.info("%s", _measured(choice))
    if choice.is_known:
        return replace(choice, size=settings.size)
    needs_vqgan = settings.stage == "transformer" or settings.tokens == "keep"
    takes_vqgan = settings.size == "base" and (on_gpu or needs_vqgan)
    size = "laptop" if settings.size == "base" and not takes_vqgan else settings.size
    return replace(choice, clip=settings.base_clip, vqgan=PUBLISHED_VQGAN if takes_vqgan else "", size=size)


def _measured(choice: Choice) -> str:
    usual = "was trained on such pictures" if choice.is_known else "was trained on other pictures"
    apart = "hardly tells them apart" if choice.cosine >= ALIKE_COSINE else "tells them apart"
    measure = (
        f"activations differ by {choice.nats:.2f} nats from those of its training, {STRANGE_NATS:g} at most on such"
    )
    if choice.remembered is not None:
        measure = f"cosine {choice.remembered:.2f} with the nearest it remembers, {KNOWN_COSINE:g} or more on such"
    return f"the CLIP of {choice.model} {usual} ({measure}) and {apart} (mean cosine {choice.cosine:.2f})"


def download(choice: Choice, settings: TrainSettings) -> Choice:
    """Downloads what the choice needs; if that fails, the model that predicts, with a warning."""
    files = choice.files()
    if not files:
        return choice
    log.info("to download: %s; base=... names another base", ", ".join(map(str, files)))
    try:
        for file in files:
            pull.check_reachable(file)
        if pull.CLIPS[choice.clip] in files:
            pull.pull_clip(choice.clip)
        if choice.vqgan and not (pull.vqgan_folder(choice.vqgan) / CONFIG).is_file():
            pull.pull_vqgan(choice.vqgan)
    except (ValueError, OSError, http.client.HTTPException) as error:
        return replace(
            choice, clip="", vqgan="", size=settings.size, warning=_why_no_prompt_works(choice, files, error)
        )
    return choice


def _why_no_prompt_works(choice: Choice, files: Sequence[pull.Published], error: Exception) -> str:
    names = " and ".join(file.name for file in files)
    return (
        f"the CLIP of {choice.model} does not know such pictures, and {names} could not be downloaded "
        f"({reason_of(error)}). So the trained model will reconstruct the pictures, but no prompt about them can work; "
        f"where there is a network, run {choice.commands()} and train again, into another folder"
    )


def chosen_folder(choice: Choice, folder: Path, on_gpu: bool) -> Path:
    """The model folder of a choice with a published CLIP; `folder` is where to write one, if it has two parts."""
    clip = pull.clip_folder(choice.clip)
    if not choice.vqgan:
        return clip
    # A transformer of the size that the device trains in hours.
    size = "medium" if on_gpu else "laptop"
    join(clip, pull.vqgan_folder(choice.vqgan), MODEL_SIZES[size][1], folder)
    return folder


def join(clip: Path, vqgan: Path, gpt: GPTConfig, out: Path) -> None:
    """Writes a model folder of links, with the CLIP of one and the VQGAN of another, and without a transformer.

    gpt: the sizes of the transformer to be trained.
    """
    config, theirs = load_config(vqgan), load_config(clip).clip
    codes, length = config.vqgan.codebook_size, config.vqgan.grid**2
    gpt = replace(gpt, block_size=length, codebook_size=codes, embed_dim=theirs.embed_dim)
    with atomic_folder(out) as folder:
        (folder / "clip.safetensors").symlink_to((clip / "clip.safetensors").resolve())
        for name in ("vqgan.safetensors", DISCRIMINATOR):
            if (vqgan / name).is_file():
                (folder / name).symlink_to((vqgan / name).resolve())
        imported = load_record(clip).get("imported", {}) | load_record(vqgan).get("imported", {})
        write_description(folder, replace(config, clip=theirs, gpt=gpt), {"imported": imported})
