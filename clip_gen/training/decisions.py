"""What is decided once, for all processes and when a training resumes: its perceptual loss, and the base's tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from clip_gen.files import MODULE, write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.skip_init import SkipInit
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.datasets import PictureFiles
from clip_gen.training.folder import saved_settings
from clip_gen.training.losses import mean_decibels, reconstruction_errors
from clip_gen.training.plan import NEW_TOKENS, Tokens
from clip_gen.training.processes import wait_for
from clip_gen.weights.default_model import lpips_weights
from clip_gen.weights.model_folder import load_part, transformer_matches

if TYPE_CHECKING:
    from clip_gen.training.job import Training

log = logging.getLogger(__name__)

PULL = f"{MODULE} pull lpips"
MIN_SIDE = 16  # pixels, for LPIPS
# Published VQGANs with 16 by 16 tokens reach 20 dB on photographs like those they were trained on. Pale pictures have
# a high PSNR with any VQGAN, so it must also be much better than each picture's mean colour.
GOOD_DB, BETTER_DB = 18.0, 6.0
VERY_GOOD_DB, MUCH_BETTER_DB = 25.0, 15.0
TOKENS = "vqgan/tokens.json"  # in the folder work


def uses_lpips(resolution: int) -> bool:
    """Whether a stage 1 that begins now uses LPIPS, at this side of the pictures."""
    return lpips_weights().is_file() and resolution >= MIN_SIDE


def choose_lpips(folder: Path, resolution: int) -> FrozenLPIPS | None:
    """LPIPS if its weights were pulled before the training began, or None for CLIP's features; logs the choice.

    folder: the stage's. ValueError if the choice was LPIPS and its weights are now missing or damaged.
    """
    weights, choice = lpips_weights(), folder / "perceptual_loss"
    if not rank_zero_only.rank and not choice.is_file():
        _write(choice, "LPIPS" if uses_lpips(resolution) else "CLIP")
    wait_for(choice)
    if choice.read_text() == "CLIP":
        remedy = f"for LPIPS, run {PULL} before a training on pictures of {MIN_SIDE} pixels and more begins"
        log.info("perceptual loss: features of CLIP; %s", remedy)
        return None
    with SkipInit():
        lpips = FrozenLPIPS()
    try:
        load_part(lpips, weights)
    except ValueError as error:
        raise ValueError(f"{weights}: missing or damaged; this training began with LPIPS: run {PULL}") from error
    log.info("perceptual loss: LPIPS, of %s", weights)
    return lpips.to(memory_format=torch.channels_last)  # fastest for convolutions


def settle_tokens(training: Training, is_dry: bool = False) -> Tokens:
    """With tokens auto: kept if the base's VQGAN reconstructs the pictures well. is_dry: writes nothing."""
    settings = training.settings
    if settings.size != "base":
        return NEW_TOKENS
    matches = transformer_matches(training.base)
    if settings.stage == "transformer" or settings.tokens != "auto" or not matches:
        kept = settings.stage == "transformer" or settings.tokens == "keep"
        return Tokens(kept, kept and matches)
    decision, vqgan = training.work / TOKENS, training.networks.vqgan
    is_settled = decision.is_file() and bool(saved_settings(training.out))  # or it is of a training that did not begin
    if training.is_first and not is_settled:
        quality = measure_quality(vqgan, judged_pictures(training))
        outcome = "its tokens are kept" if is_good(**quality) else "its tokens are trained too"
        log.info("%s: %s", _sentence(**quality), outcome)
        if is_dry:
            return _tokens_of(quality)
        _write(decision, json.dumps(quality))
    wait_for(decision)
    return _tokens_of(json.loads(decision.read_text()))


def _tokens_of(decision: dict[str, float] | bool) -> Tokens:
    """From the measured quality, or, by earlier versions, only whether it was good."""
    if isinstance(decision, bool):
        return Tokens(decision, decision)
    good = is_good(**decision)
    return Tokens(good, good, is_very_good(**decision))


def judged_pictures(training: Training) -> PictureFiles:
    """The pictures on which the base's VQGAN is measured."""
    resolution, letterbox = training.networks.config.vqgan.resolution, training.settings.letterbox
    return PictureFiles(training.sample_of_pictures(), resolution, letterbox=letterbox)


def warn_if_poor(training: Training) -> dict[str, float]:
    """Logs the quality of a VQGAN that is not trained, as a warning if it is poor; returns it for the record."""
    quality = measure_quality(training.networks.vqgan, judged_pictures(training))
    sentence = _sentence(**quality)
    if is_good(**quality):
        log.info(sentence)
    else:
        log.warning("%s, and drawn pictures look no better; give stage both to train the VQGAN too", sentence)
    return quality


def left_out(vqgan: VQGAN, held_back: Dataset) -> dict[str, object]:
    """The record of a stage 1 that is left out, since the base's VQGAN reconstructs the pictures very well."""
    quality = measure_quality(vqgan, held_back)
    log.info("stage 1 is left out: %s", _sentence(**quality))
    measured = {f"val_{name}": value for name, value in quality.items()}
    steps = {"steps": 0, "planned_steps": 0, "ended_by": "steps", "fine_tunes": True, "minutes": 0.0}
    return steps | measured | {"tokens_kept": True}


@torch.no_grad()
def measure_quality(vqgan: VQGAN, pictures: Dataset) -> dict[str, float]:
    """PSNR in dB of the reconstructions of pictures (S, S, 3) uint8, and of each picture's mean colour."""
    with on_device(vqgan) as device:
        batches = (from_bytes(batch.to(device)) for batch in DataLoader(pictures, 16))
        errors = [reconstruction_errors(vqgan, images).cpu() for images in batches]
    psnr, mean_colour_psnr = mean_decibels(torch.cat(errors, dim=1)).tolist()
    return {"psnr": round(psnr, 2), "mean_colour_psnr": round(mean_colour_psnr, 2)}


def is_good(psnr: float, mean_colour_psnr: float) -> bool:
    return psnr >= GOOD_DB and psnr - mean_colour_psnr >= BETTER_DB


def is_very_good(psnr: float, mean_colour_psnr: float) -> bool:
    return psnr >= VERY_GOOD_DB and psnr - mean_colour_psnr >= MUCH_BETTER_DB


def _sentence(psnr: float, mean_colour_psnr: float) -> str:
    return (
        f"the base's VQGAN reconstructs these pictures at {psnr:.1f} dB, their mean colour is at {mean_colour_psnr:.1f}"
    )


def _write(decision: Path, text: str) -> None:
    decision.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(decision, text)
