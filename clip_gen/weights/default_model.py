"""The model to load when a request names none, and the files of LPIPS, InceptionV3 and the upscaler."""

from __future__ import annotations

import os
from pathlib import Path

from clip_gen.files import ROOT
from clip_gen.weights.importers import inception, lpips, upscaler
from clip_gen.weights.model_folder import CONFIG
from clip_gen.weights.pull import CHECKPOINTS, pull_coco
from clip_gen.weights.url import is_url

BUNDLED = CHECKPOINTS / "emoji"
COCO = CHECKPOINTS / "coco"


def default_model(named: str | None = None) -> tuple[str, str]:
    """Weights for open_weights, and why they were chosen.

    named: the value of COG_WEIGHTS, see find_weights; the COCO model is pulled if it is missing. Without it: the COCO
    model if it was pulled, else the bundled one. ValueError if there is none.
    """
    if named:
        weights = find_weights(named)
        if weights == str(COCO) and not (COCO / CONFIG).is_file():
            pull_coco(COCO)
        return weights, "COG_WEIGHTS names it"
    if (COCO / CONFIG).is_file():
        return str(COCO), "it was pulled"
    if not (BUNDLED / CONFIG).is_file():
        raise ValueError(
            "no model is installed: `clip-gen pull coco` downloads one of photographs (2 GB); "
            "or name a model folder, a weights tar or its URL"
        )
    return str(BUNDLED), "no other was named or pulled; it draws emoji only"


def find_weights(name: str) -> str:
    """The path of a model in checkpoints/, for "NAME" or "checkpoints/NAME"; an existing path or a URL as it is."""
    if is_url(name) or os.path.lexists(os.path.expanduser(name)):
        return name
    model = CHECKPOINTS / name.removeprefix("checkpoints/")
    return str(model) if model.is_dir() or name in ("coco", "checkpoints/coco") else name


def lpips_weights() -> Path:
    """The file with LPIPS's weights, which may not exist: in the folder $CLIP_GEN_LPIPS, or where `pull` writes it."""
    return ROOT / (os.environ.get("CLIP_GEN_LPIPS") or CHECKPOINTS / "lpips") / lpips.WEIGHTS


def inception_weights() -> Path:
    """The file with InceptionV3's weights, which may not exist: in $CLIP_GEN_INCEPTION, or where `pull` writes it."""
    return ROOT / (os.environ.get("CLIP_GEN_INCEPTION") or CHECKPOINTS / "inception") / inception.WEIGHTS


def upscaler_weights() -> Path:
    """The file with the upscaler's weights, which may not exist: in $CLIP_GEN_UPSCALER, or where `pull` writes it."""
    return ROOT / (os.environ.get("CLIP_GEN_UPSCALER") or CHECKPOINTS / "upscaler") / upscaler.WEIGHTS
