"""Which model predicts when a request names none, and where LPIPS is, which training asks for."""

from __future__ import annotations

import os
from pathlib import Path

from clip_gen.files import ROOT
from clip_gen.weights.importers import lpips
from clip_gen.weights.model_folder import CONFIG
from clip_gen.weights.pull import CHECKPOINTS, pull_coco
from clip_gen.weights.url import is_url

BUNDLED = CHECKPOINTS / "shapes"
COCO = CHECKPOINTS / "coco"


def own_weights(given: str | None = None) -> tuple[str, str]:
    """Something for open_weights, and why it was chosen.

    given: the value of COG_WEIGHTS. After it comes CLIP_GEN_MODEL, which cog.yaml may set: whatever open_weights takes,
    or "coco" to pull that model where it is missing. Then the COCO model if it was pulled, then the bundled one.
    """
    if given:
        return given, "COG_WEIGHTS names it"
    named = os.environ.get("CLIP_GEN_MODEL")
    if named == "coco":
        if not (COCO / CONFIG).is_file():
            pull_coco(COCO)
        return str(COCO), "CLIP_GEN_MODEL names it"
    if named:
        return named if is_url(named) else str(ROOT / Path(named).expanduser()), "CLIP_GEN_MODEL names it"
    if (COCO / CONFIG).is_file():
        return str(COCO), "it was pulled"
    if not (BUNDLED / CONFIG).is_file():
        raise ValueError(
            "no model is installed: `clip-gen pull coco` downloads one of photographs (2 GB); "
            "or name a model folder, a weights tar or its URL"
        )
    return str(BUNDLED), "no other was named or pulled; it knows plain shapes only"


def own_lpips() -> Path:
    """The file with LPIPS's weights, there or not: in the folder CLIP_GEN_LPIPS names, else where it is pulled to."""
    return ROOT / (os.environ.get("CLIP_GEN_LPIPS") or CHECKPOINTS / "lpips") / lpips.WEIGHTS
