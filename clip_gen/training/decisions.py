"""What stage 1 decides once, for all its processes and when it resumes: its perceptual loss, and the base's tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from clip_gen.files import write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.skip_init import SkipInit
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.losses import mean_decibels, reconstruction_errors
from clip_gen.training.processes import wait_for
from clip_gen.weights.default_model import lpips_weights
from clip_gen.weights.model_folder import load_part

log = logging.getLogger(__name__)

PULL = "python -m clip_gen pull lpips"
MIN_SIDE = 16  # pixels, for LPIPS
# Published VQGANs with 16 by 16 tokens reach 20 dB on photographs like those they were trained on. Pale pictures have
# a high PSNR with any VQGAN, so it must also be much better than each picture's mean colour.
GOOD_DB, BETTER_DB = 18.0, 6.0


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


def decide_to_keep_tokens(vqgan: VQGAN, pictures: Dataset, decision: Path) -> bool:
    """Whether the base's VQGAN is good enough to keep its tokens, so that its transformer still fits."""
    if not rank_zero_only.rank and not decision.is_file():
        quality = measure_quality(vqgan, pictures)
        good = is_good(**quality)
        outcome = "its tokens are kept and its decoder is trained" if good else "its tokens are trained too"
        log.info("%s: %s", _sentence(**quality), outcome)
        _write(decision, json.dumps(good))
    wait_for(decision)
    return json.loads(decision.read_text())


def warn_if_poor(vqgan: VQGAN, pictures: Dataset) -> dict[str, float]:
    """Logs the quality of a VQGAN that is not trained, as a warning if it is poor; returns it for the record."""
    quality = measure_quality(vqgan, pictures)
    sentence = _sentence(**quality)
    if is_good(**quality):
        log.info(sentence)
    else:
        log.warning("%s, and drawn pictures look no better; give stage both to train the VQGAN too", sentence)
    return quality


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


def _sentence(psnr: float, mean_colour_psnr: float) -> str:
    return (
        f"the base's VQGAN reconstructs these pictures at {psnr:.1f} dB, their mean colour is at {mean_colour_psnr:.1f}"
    )


def _write(decision: Path, text: str) -> None:
    decision.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(decision, text)
