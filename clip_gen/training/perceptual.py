"""Chooses the perceptual loss of stage 1: LPIPS if its weights have been downloaded, else features of CLIP."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

from clip_gen.files import write_text_atomic
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.skip_init import SkipInit
from clip_gen.training.processes import wait_for
from clip_gen.weights.default_model import lpips_weights
from clip_gen.weights.model_folder import load_part

log = logging.getLogger(__name__)

PULL = "python -m clip_gen pull lpips"
MIN_SIDE = 16  # pixels, for LPIPS


def choose_lpips(folder: Path, resolution: int) -> nn.Module | None:
    """LPIPS, or None for CLIP's features; logs the choice, and how to get LPIPS.

    The first process writes the choice to the stage's folder, for the other processes and for resumed trainings.
    ValueError if it was LPIPS and its weights are now missing or damaged.
    """
    weights, choice = lpips_weights(), folder / "perceptual_loss"
    if not choice.is_file() and not rank_zero_only.rank:
        folder.mkdir(parents=True, exist_ok=True)
        began_without = (folder / "last.ckpt").is_file()  # by an earlier version, which had no LPIPS
        fits = weights.is_file() and resolution >= MIN_SIDE and not began_without
        if fits:
            _load(weights)  # an error here must come before the choice is written
        write_text_atomic(choice, "LPIPS" if fits else "CLIP")
    wait_for(choice)
    if choice.read_text() == "LPIPS":
        return _load(weights)
    log.info("perceptual loss: features of CLIP, for %s", _reason(weights, resolution))
    return None


def _reason(weights: Path, resolution: int) -> str:
    if not weights.is_file():
        return f"{weights} is not there; {PULL} gets LPIPS, for trainings that begin after it"
    if resolution < MIN_SIDE:
        return f"LPIPS takes pictures of {MIN_SIDE} pixels and more"
    return "this training began with them; one in another folder would take LPIPS"


def _load(weights: Path) -> nn.Module:
    if not weights.is_file():
        raise ValueError(f"{weights}: missing, and this training began with LPIPS; get it again by {PULL}")
    with SkipInit():
        lpips = FrozenLPIPS()
    try:
        load_part(lpips, weights)
    except ValueError as error:
        raise ValueError(f"{weights}: is not LPIPS as pull leaves it ({error}); get it again by {PULL}") from error
    log.info("perceptual loss: LPIPS, of %s", weights)
    return lpips
