"""CLIP-GEN: a text-to-image generator trained without a word of text.

    prompt --clip_encoder--> embedding --bridge, gpt, sampling--> tokens --vqgan--> images --clip_encoder--> ranked

Reading order: config (every dial), images, clip_encoder, vqgan, gpt and its cache, sampling, bridge, checkpoint (the
model folder), pipeline (all of it in one sentence), batching (how requests share it), serving and predict.py; then
archives and training (how the weights came about), importers (other people's weights) and shapes (the demo world).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_gen.pipeline import ClipGen, Generation

__all__ = ["ClipGen", "Generation"]


def __getattr__(name: str) -> object:
    # Lazily: torch takes seconds to import, and a command's --help or Cog's schema never needs it.
    if name in __all__:
        return getattr(importlib.import_module("clip_gen.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
