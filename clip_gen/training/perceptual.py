"""Which network tells stage 1 how alike two pictures look: LPIPS where its weights are, else the frozen CLIP."""

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
LEAST_SIDE = 16  # pixels that LPIPS can look at


def chosen_lpips(folder: Path, resolution: int) -> nn.Module | None:
    """LPIPS, or None where CLIP takes its place; says which, and how to get LPIPS.

    folder: the stage's, which notes it down: a training that was cut off goes on with what it began with, and every
    process does as the first. ValueError when it began with LPIPS and that is gone, or damaged.
    """
    file, note = lpips_weights(), folder / "perceptual_loss"
    if not note.is_file() and not rank_zero_only.rank:
        folder.mkdir(parents=True, exist_ok=True)
        begun = (folder / "last.ckpt").is_file()  # without a note: before there was LPIPS
        fits = file.is_file() and resolution >= LEAST_SIDE and not begun
        if fits:
            _loaded(file)  # or there is nothing to go on with
        write_text_atomic(note, "LPIPS" if fits else "CLIP")
    wait_for(note)
    if note.read_text() == "LPIPS":
        return _loaded(file)
    log.info("perceptual loss: features of CLIP, for %s", _why_not(file, resolution))
    return None


def _why_not(file: Path, resolution: int) -> str:
    if not file.is_file():
        return f"{file} is not there; {PULL} gets LPIPS, for trainings that begin after it"
    if resolution < LEAST_SIDE:
        return f"LPIPS takes pictures of {LEAST_SIDE} pixels and more"
    return "this training began with them; one in another folder would take LPIPS"


def _loaded(file: Path) -> nn.Module:
    if not file.is_file():
        raise ValueError(f"{file}: missing, and this training began with LPIPS; get it again by {PULL}")
    with SkipInit():
        lpips = FrozenLPIPS()
    try:
        load_part(lpips, file)
    except ValueError as error:
        raise ValueError(f"{file}: is not LPIPS as pull leaves it ({error}); get it again by {PULL}") from error
    log.info("perceptual loss: LPIPS, of %s", file)
    return lpips
