"""How well a VQGAN reconstructs pictures, which decides whether its tokens are kept."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from clip_gen.files import write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.losses import colour_errors, decibels, mean_errors, squared_errors
from clip_gen.training.processes import wait_for

log = logging.getLogger(__name__)

# Published VQGANs with 16 by 16 tokens reach 20 dB on photographs like those they were trained on. Pale pictures have
# a high PSNR with any VQGAN, so it must also be much better than each picture's mean colour.
GOOD_DB, BETTER_DB = 18.0, 6.0


@dataclass(frozen=True)
class Quality:
    """The PSNR of reconstructions, and of each picture's mean colour in their place, both in dB."""

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


@torch.no_grad()
def measure_quality(vqgan: VQGAN, pictures: Dataset) -> Quality:
    """The quality of a VQGAN's reconstructions of pictures (S, S, 3) uint8."""
    errors = []
    with on_device(vqgan) as device:
        for batch in DataLoader(pictures, 16):
            images = from_bytes(batch.to(device))
            decoded = vqgan.decode(vqgan.encode(images))
            errors.append(torch.stack([squared_errors(decoded, images), colour_errors(images)]).cpu())
    reconstructed, mean_colour = decibels(mean_errors(torch.cat(errors, dim=1))).tolist()
    return Quality(reconstructed, mean_colour)


def decide_to_keep_tokens(vqgan: VQGAN, pictures: Dataset, decision: Path) -> bool:
    """Whether the VQGAN is good enough to keep its tokens, so that its transformer still fits.

    The first process measures it and writes the decision to a file, for the others and for a resumed training.
    """
    if rank_zero_only.rank:
        wait_for(decision)
    if decision.is_file():
        return json.loads(decision.read_text())
    quality = measure_quality(vqgan, pictures)
    outcome = "its tokens are kept and its decoder is trained" if quality.good else "its tokens are trained too"
    log.info("%s: %s", quality, outcome)
    decision.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(decision, json.dumps(quality.good))
    return quality.good


def warn_if_poor(quality: Quality) -> dict[str, float]:
    """Logs the quality of a VQGAN that is not trained, as a warning if it is poor; returns it for the record."""
    if quality.good:
        log.info("%s", quality)
    else:
        log.warning("%s, and drawn pictures look no better; give stage both to train the VQGAN too", quality)
    return {name: round(value, 2) for name, value in asdict(quality).items()}
