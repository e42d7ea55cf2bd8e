"""CLIP-GEN: a text-to-image generator trained without a word of text.

docs/design.md has the diagram and one line for each file. To follow a prompt, read pipeline, networks/clip_encoder,
sampling/sampler, networks/gpt and networks/vqgan; to follow a training, training/job.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_gen.pipeline import ClipGen, Generation

if sys.platform != "linux":
    raise ImportError("clip_gen runs on Linux only; on macOS use Docker, on Windows use WSL 2 or Docker")

__all__ = ["ClipGen", "Generation"]


def __getattr__(name: str) -> object:
    # Lazily: torch takes seconds to import, and a command's --help or Cog's schema never needs it.
    if name in __all__:
        return getattr(importlib.import_module("clip_gen.pipeline"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
