"""The transformer's training data: views of all pictures, encoded once into work/encoded."""

from __future__ import annotations

import logging
import time
from math import inf
from pathlib import Path

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.data import Dataset, Subset

from clip_gen.files import write_text_atomic
from clip_gen.training.datasets import EncodedPictures, PictureFiles, Views, enough_places
from clip_gen.training.encoding import encode_embeddings, encode_tokens
from clip_gen.training.neighbours import find_neighbours
from clip_gen.training.plan import TrainSettings
from clip_gen.training.record import few_pictures
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

ENCODING_TIME = 0.05  # of max_minutes
TIME_LIMIT = "max_minutes"  # the file with the setting of this name at the time the pictures were encoded
EMBEDDINGS, TOKENS, NEIGHBOURS = "embeddings-learnt.npy", "tokens-learnt.npy", "neighbours-learnt.npy"


def encode_train_pictures(
    files: PictureFiles, view_count: int, networks: Networks, folder: Path, settings: TrainSettings
) -> EncodedPictures:
    """Views of every picture, as many as there is time for, with neighbours if the settings need them."""
    views = Views(files, view_count, settings.seed) if view_count > 1 else files
    _encode(views, networks, folder / EMBEDDINGS, folder / TOKENS, settings.max_minutes)
    if not rank_zero_only.rank and not (folder / TIME_LIMIT).is_file():
        write_text_atomic(folder / TIME_LIMIT, str(settings.max_minutes or inf))
    neighbours = None
    if settings.contrast_weight or settings.condition_blur:
        neighbours = find_neighbours(folder / EMBEDDINGS, len(files), folder / NEIGHBOURS, settings.seed)
    tokens = np.load(folder / TOKENS, mmap_mode="r")
    encoded = EncodedPictures(
        folder / EMBEDDINGS,
        folder / TOKENS,
        len(files),
        noise=settings.embedding_noise,
        dropout=settings.condition_dropout,
        neighbours=neighbours,
        blur=settings.condition_blur,
        places=0 if settings.embedding_loss_weight else enough_places(tokens),  # that loss needs whole pictures
    )
    if len(encoded) < len(files) and not rank_zero_only.rank:
        log.warning(few_pictures(encoding_limit(folder, settings), len(encoded), len(files)))
    return encoded


def encode_held_back(files: PictureFiles, networks: Networks, folder: Path, settings: TrainSettings) -> EncodedPictures:
    embeddings, tokens = folder / "embeddings-held_back.npy", folder / "tokens-held_back.npy"
    _encode(files, networks, embeddings, tokens, settings.max_minutes)
    return EncodedPictures(embeddings, tokens)


def _encode(pictures: Dataset, networks: Networks, embeddings: Path, tokens: Path, max_minutes: float) -> None:
    """Writes the files unless they exist. First come the first views of all pictures."""
    began, seconds = time.monotonic(), 60 * ENCODING_TIME * max_minutes or inf
    # Not compiled: a resumed training, which has compiled nothing, must get the same tokens.
    with torch.compiler.set_stance("force_eager"):
        encode_embeddings(pictures, networks.clip, embeddings, seconds / 2)
        embedded = Subset(pictures, range(len(np.load(embeddings, mmap_mode="r"))))
        encode_tokens(embedded, networks.vqgan, tokens, seconds - (time.monotonic() - began))


def encoding_limit(folder: Path, settings: TrainSettings) -> float:
    """max_minutes when the pictures were encoded."""
    limit = folder / TIME_LIMIT
    return float(limit.read_text()) if limit.is_file() else settings.max_minutes


def remove_incomplete_views(folder: Path, wanted: int, max_minutes: float) -> None:
    """Removes arrays that the time limit cut short of `wanted` views, if there is more time now."""
    limit = folder / TIME_LIMIT
    if limit.is_file() and 0 < max_minutes <= float(limit.read_text()):
        return
    arrays = [folder / EMBEDDINGS, folder / TOKENS]
    if any(path.is_file() and len(np.load(path, mmap_mode="r")) < wanted for path in arrays):
        for path in (*arrays, limit, folder / NEIGHBOURS):
            path.unlink(missing_ok=True)
