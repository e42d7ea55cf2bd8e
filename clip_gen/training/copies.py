"""Whether a transformer that was trained on few pictures draws copies of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.metrics.intervals import Share
from clip_gen.metrics.neighbours import is_close, nearest
from clip_gen.sampling.cuda_graphs import forget
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens
from clip_gen.training.datasets import PictureFiles, loader_with_workers
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

DRAWN = 32
MOST_CLOSE = 0.75  # half is usual. More is a warning, if the lower end of the 95 % interval is above this


@torch.no_grad()
def find_copies(networks: Networks, pictures: PictureFiles, seed: int) -> dict[str, int]:
    """How many pictures were `drawn`, and how many of them are `close_to_training` pictures, as is_close tells.

    Each is drawn from a mixture of the embeddings of two training pictures: a model that has learnt what they have in
    common draws something new, one that has learnt them by heart draws one of them.
    """
    networks.gpt.eval().requires_grad_(False)
    clip, vqgan = networks.clip, networks.vqgan
    with on_device(clip, vqgan, networks.gpt) as device:
        batches = loader_with_workers(pictures, batch_size=DRAWN)
        embeddings = torch.cat([clip.encode_image(from_bytes(batch.to(device))) for batch in batches])
        tokens = sample_tokens(
            networks.gpt,
            mixtures(embeddings, DRAWN, seed),
            candidate_uniforms(seed, range(DRAWN), networks.config.gpt.block_size),
            Sampling(),
        )
        forget(networks.gpt)  # recorded CUDA graphs would keep their memory
        drawn = clip.encode_image(vqgan.decode(tokens).clamp(-1, 1))
    centre = embeddings.mean(dim=0)  # distances between embeddings that are much alike would be rounded to nothing
    drawn, embeddings = (drawn - centre).cpu(), (embeddings - centre).cpu()
    close = int(is_close(nearest(drawn, embeddings)[0], embeddings).sum())
    found = {"drawn": DRAWN, "close_to_training": close}
    log.info("copies: %s", in_words(found))
    return found


def mixtures(embeddings: Tensor, count: int, seed: int) -> Tensor:
    """Mixtures of two of the embeddings (N, E) each, (count, E), unit length."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(embeddings), (count,), generator=generator)
    second = (first + torch.randint(1, len(embeddings), (count,), generator=generator)) % len(embeddings)
    return F.normalize(embeddings[first] + embeddings[second], dim=1)


def in_words(record: Mapping[str, object]) -> str:
    """Of find_copies; empty if that was not measured."""
    if "drawn" not in record:
        return ""
    return (
        f"{record['close_to_training']} of {record['drawn']} pictures drawn from mixtures of two training pictures are "
        "as close to a training picture as half of these are to another; half is usual, all would be copies"
    )


def warning(record: Mapping[str, object]) -> str:
    """What to say of a transformer that copies; empty for others."""
    if "drawn" not in record or Share(record["close_to_training"], record["drawn"]).interval[0] <= MOST_CLOSE:
        return ""
    return (
        f"the transformer draws copies of its training pictures: {in_words(record)}. Train on more pictures or for "
        "fewer transformer_steps, and leave lora auto, crop and flip as they are by default"
    )
