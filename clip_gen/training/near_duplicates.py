"""Near-duplicates: pictures whose CLIP embeddings are almost the same as an earlier picture's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from clip_gen.data.limits import ArchiveError
from clip_gen.data.manifest import Pictures, Skipped
from clip_gen.files import write_text_atomic
from clip_gen.hardware import on_device
from clip_gen.images import from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.training.datasets import PictureFiles, loader_with_workers
from clip_gen.training.processes import wait_for

NEAR_DUPLICATE = "a near-duplicate"
BLOCK = 1024  # pictures that are compared with all earlier ones at a time
LEAST_LEFT = 8


def without_near_duplicates(pictures: Pictures, clip: ClipEncoder, least_cosine: float, work: Path) -> Pictures:
    """The pictures without those whose cosine with an earlier one is at least `least_cosine`, which are skipped.

    0 keeps all. The first process decides, once, in a file in the folder `work`. ArchiveError if fewer than LEAST_LEFT
    pictures are left.
    """
    decision = work / f"near_duplicates-{least_cosine:g}-of-{len(pictures.paths)}.json"
    if not least_cosine:
        return pictures
    if not rank_zero_only.rank and not decision.is_file():
        similar = similar_to_earlier(_embeddings(pictures, clip), least_cosine)
        write_text_atomic(decision, json.dumps(similar))
    wait_for(decision)
    similar = {number: (earlier, cosine) for number, earlier, cosine in json.loads(decision.read_text())}
    left = [number for number in range(len(pictures.paths)) if number not in similar]
    if len(left) < LEAST_LEFT:
        raise ArchiveError(
            f"drop_similar is {least_cosine}: {len(left)} pictures are left, and {LEAST_LEFT} are needed; give a "
            "higher one, into another folder"
        )
    names = pictures.names or [path.name for path in pictures.paths]
    skipped = [
        Skipped(names[number], NEAR_DUPLICATE, f"of {names[earlier]}, cosine {cosine:.3f}")
        for number, (earlier, cosine) in similar.items()
    ]
    return replace(
        pictures,
        paths=[pictures.paths[number] for number in left],
        names=[pictures.names[number] for number in left] if pictures.names else [],
        skipped=pictures.skipped + skipped,
    )


@torch.no_grad()
def _embeddings(pictures: Pictures, clip: ClipEncoder) -> Tensor:
    """(N, E), of the central squares."""
    loader = loader_with_workers(PictureFiles(pictures.paths, clip.config.image_resolution), batch_size=64)
    with on_device(clip) as device:
        return torch.cat([clip.encode_image(from_bytes(batch.to(device))).cpu() for batch in loader])


def similar_to_earlier(embeddings: Tensor, least_cosine: float) -> list[tuple[int, int, float]]:
    """The rows of unit vectors (N, E) with at least this cosine to an earlier row that is not in the result itself.

    For each its number, that of the most similar earlier row, and their cosine.
    """
    kept = torch.zeros(len(embeddings), dtype=torch.bool)
    found = []
    for first in range(0, len(embeddings), BLOCK):
        block = embeddings[first : first + BLOCK]
        cosines = block @ embeddings[: first + len(block)].T  # (block, earlier rows and the block itself)
        for number, row in enumerate(cosines, first):
            earlier = row[:number].masked_fill(~kept[:number], -1.0)
            if number and earlier.max() >= least_cosine:
                found.append((number, int(earlier.argmax()), round(float(earlier.max()), 4)))
            else:
                kept[number] = True
    return found
