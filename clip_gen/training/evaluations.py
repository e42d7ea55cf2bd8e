"""FID and CMMD on held-back pictures during a stage, into its history.jsonl, if --evaluate-every asks for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from clip_gen.images import from_bytes
from clip_gen.metrics.distributions import cmmd, fid
from clip_gen.metrics.features import choose_features, clip_features
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.sampling.cuda_graphs import forget
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens
from clip_gen.training.callbacks import append_history
from clip_gen.training.datasets import PictureFiles
from clip_gen.training.loggers import log_values
from clip_gen.training.stage import Stage
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

BATCH = 32
Drawing = Callable[[Stage, Tensor], Tensor]  # from pictures to what the network makes of them, both (B, 3, S, S)


class Evaluations(Callback):
    """Compares held-back pictures with what `draw` makes of them, every so many steps and at the end.

    FID is of InceptionV3's features if it was pulled, else of the CLIP's; CMMD is of the CLIP's. The first process
    does this while the others wait. The weights become the same as without it.
    """

    def __init__(self, name: str, every: int, pictures: PictureFiles, clip: ClipEncoder, draw: Drawing, folder: Path):
        self.name, self.every, self.pictures, self.clip, self.draw = name, every, pictures, clip, draw
        self.history, self.last_step = folder / "history.jsonl", -1

    def on_train_batch_end(self, trainer: pl.Trainer, module: Stage, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            self._evaluate(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Stage) -> None:
        self._evaluate(trainer, module)

    def _evaluate(self, trainer: pl.Trainer, module: Stage) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self.last_step:
            return
        self.last_step, training = step, module.training
        module.eval()
        try:
            # Compiling for these few would take longer than drawing them.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                values, features = self.measure(module)
        finally:
            module.train(training)
        append_history(self.history, step, values)
        log_values(trainer.loggers, step, values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s %d: %s, on %d held-back pictures, %s", self.name, step, shown, len(self.pictures), features)

    def measure(self, module: Stage) -> tuple[dict[str, float], str]:
        """FID, named after its features' network, and CMMD; and the name of FID's features."""
        device = next(self.clip.parameters()).device
        network, own = choose_features("auto", self.clip, "the base", device), clip_features(self.clip, "the base")
        found: list[list[Tensor]] = [[], [], [], []]
        for numbers in torch.arange(len(self.pictures)).split(BATCH):
            pixels = torch.from_numpy(np.stack([self.pictures[i] for i in numbers.tolist()]))
            images = from_bytes(pixels).to(module.device)
            for i, part in enumerate((images, self.draw(module, images).clamp(-1, 1))):
                found[i].append(network([part.to(device)]))
                found[2 + i].append(own([part.to(device)]))
        real, drawn, real_embeddings, embeddings = map(torch.cat, found)
        kind = "clip" if network.name == own.name else "inception"
        values = {f"fid_{kind}": fid(real, drawn), "cmmd": cmmd(real_embeddings, embeddings)[0].value}
        return {name: round(value, 6) for name, value in values.items()}, network.name


def reconstruct(module: Stage, images: Tensor) -> Tensor:
    """For stage 1."""
    return module.vqgan.decode(module.vqgan.encode(images))


def sample_with(networks: Networks, seed: int) -> Drawing:
    """For stage 2: images sampled from the pictures' embeddings, the same random numbers each time."""

    def sample(module: Stage, images: Tensor) -> Tensor:
        conditions = networks.clip.encode_image(images)
        uniforms = candidate_uniforms(seed, range(len(images)), module.gpt.config.block_size)
        try:
            tokens = sample_tokens(module.gpt, conditions, uniforms, Sampling())
        finally:
            forget(module.gpt)  # recorded CUDA graphs would keep their memory
        return networks.vqgan.decode(tokens)

    return sample
