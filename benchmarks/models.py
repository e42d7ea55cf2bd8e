"""The models to measure: the bundled one, and one of the published size with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import reference
from clip_gen import ClipGen
from clip_gen.config import GPTConfig, ModelConfig, VQGANConfig
from clip_gen.files import ROOT
from clip_gen.hardware import set_threads
from clip_gen.sampling.batcher import shared_batcher
from clip_gen.weights.model_folder import Networks, build, save_networks

Result = TypeVar("Result")

BUNDLED = ROOT / "checkpoints" / "shapes"
EMOJI = BUNDLED.with_name("emoji")
PROMPT = "a large red circle on a white background"
# The sizes of HFAiLab's model, with OpenAI's ViT-B/32.
PUBLISHED = ModelConfig(
    name="published",
    vqgan=VQGANConfig(norm_eps=1e-5, quantizer="taming", codebook_size=16384, codebook_dim=256),
    gpt=GPTConfig(n_layer=24, n_head=16, n_embd=1024, codebook_size=16384, head_bias=True, null_condition=False),
)


@dataclass
class Subject:
    """A model folder, loaded as the plain reference and as ours on first use."""

    size: str  # "bundled" or "published"
    folder: Path
    device: torch.device
    times: int = 3  # repetitions of each measurement

    @property
    def on_h200(self) -> bool:
        """Whether the device is the GPU that the targets for GPUs are for."""
        return self.device.type == "cuda" and "H200" in torch.cuda.get_device_name()

    @cached_property
    def plain(self) -> Networks:
        return self.run(lambda: reference.load(self.folder, self.device))

    @cached_property
    def ours(self) -> ClipGen:
        return ClipGen.load(self.folder, self.device.type)

    def run(self, work: Callable[[], Result], ours: bool = False) -> Result:
        """Runs `work` in the batcher's thread and returns its result.

        Long torch operations belong there, since two threads with OpenMP workers slow each other down
        (hardware.one_thread). `work` must not generate or load, which would wait for the same thread.
        ours: use as many OpenMP threads as predictions of this model do; otherwise torch's default.
        """
        batcher = shared_batcher(self.device)
        threads = batcher.threads_for(self.ours.gpt) if ours else batcher.max_threads
        batcher.submit(partial(set_threads, threads))
        return batcher.submit(work).result()


def write_published(folder: Path, config: ModelConfig = PUBLISHED) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    save_networks(build(config), folder, training={})
    return folder
