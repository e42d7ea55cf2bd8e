"""The transformer's training data, computed once into .npy files: embeddings, tokens and similar pictures."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from clip_gen.files import atomic_file
from clip_gen.hardware import is_out_of_memory, on_device
from clip_gen.images import from_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.datasets import EncodedPictures, PictureFiles, Views, enough_places, loader_with_workers
from clip_gen.training.plan import TrainSettings
from clip_gen.training.processes import wait_for
from clip_gen.weights.model_folder import Networks

log = logging.getLogger(__name__)

BATCH_SIZE = 32
LOG_SECONDS = 30
ENCODING_TIME = 0.05  # of max_minutes
POOL_SIZE, MAX_NEIGHBOURS = 2048, 64
EMBEDDINGS, TOKENS, NEIGHBOURS = "embeddings-learnt.npy", "tokens-learnt.npy", "neighbours-learnt.npy"


def encode_train_pictures(
    files: PictureFiles, view_count: int, networks: Networks, folder: Path, settings: TrainSettings
) -> EncodedPictures:
    """Views of every picture, as many as there is time for, with neighbours if the settings need them."""
    views = Views(files, view_count, settings.seed) if view_count > 1 else files
    embeddings, tokens, neighbours = folder / EMBEDDINGS, folder / TOKENS, None
    _encode_in_time(views, networks, embeddings, tokens, settings.max_minutes)
    if settings.contrast_weight or settings.condition_blur:
        neighbours = find_neighbours(embeddings, len(files), folder / NEIGHBOURS, settings.seed)
    encoded = EncodedPictures(
        embeddings,
        tokens,
        len(files),
        noise=settings.embedding_noise,
        dropout=settings.condition_dropout,
        neighbours=neighbours,
        blur=settings.condition_blur,
        # The embedding loss needs whole pictures.
        places=0 if settings.embedding_loss_weight else enough_places(np.load(tokens, mmap_mode="r")),
    )
    if len(encoded) < len(files) and not rank_zero_only.rank:
        log.warning(few_pictures(len(encoded), len(files)))
    return encoded


def encode_held_back(files: PictureFiles, networks: Networks, folder: Path, max_minutes: float) -> EncodedPictures:
    embeddings, tokens = folder / "embeddings-held_back.npy", folder / "tokens-held_back.npy"
    _encode_in_time(files, networks, embeddings, tokens, max_minutes)
    return EncodedPictures(embeddings, tokens)


def _encode_in_time(pictures: Dataset, networks: Networks, embeddings: Path, tokens: Path, max_minutes: float) -> None:
    seconds = 60 * ENCODING_TIME * max_minutes or inf
    encode_once(pictures, {embeddings: networks.clip, tokens: networks.vqgan}, seconds)


def remove_incomplete_views(folder: Path, wanted: int) -> None:
    """Removes the encoded pictures if a time limit cut them short of `wanted` views."""
    arrays = [path for path in (folder / EMBEDDINGS, folder / TOKENS) if path.is_file()]
    if any(len(np.load(path, mmap_mode="r")) < wanted for path in arrays):
        shutil.rmtree(folder)


def few_pictures(encoded: int, wanted: int) -> str:
    return (
        f"gpt: its time sufficed to encode {encoded:,} of {wanted:,} pictures, and it learns from no others; give "
        f"{wanted / encoded:.1f} times as many max_minutes"
    )


@torch.no_grad()
def encode_once(pictures: Dataset, networks: Mapping[Path, ClipEncoder | VQGAN], seconds: float = inf) -> None:
    """Writes a row for each of the pictures (S, S, 3) uint8 to each file, unless it exists.

    A ClipEncoder gives embeddings (N, E) float16, a VQGAN tokens (N, T) uint16 or int32. Stops after `seconds` with the
    pictures encoded by then, at least one batch. The first process writes the files. ValueError when out of memory.
    """
    if rank_zero_only.rank:
        for path in networks:
            wait_for(path)
    missing = {path: network for path, network in networks.items() if not path.is_file()}
    if not missing:
        return
    rows: dict[Path, list[np.ndarray]] = {path: [] for path in missing}
    # Not compiled: a resumed training, which has compiled nothing, must get the same tokens.
    with on_device(*missing.values()) as device, torch.compiler.set_stance("force_eager"):
        for batch in _batches_in_time(pictures, seconds, names=", ".join(path.name for path in missing)):
            for path, network in missing.items():
                rows[path].append(_encode(network, from_bytes(batch.to(device))))
    for path, parts in rows.items():
        save_array(path, np.concatenate(parts))


def _encode(network: ClipEncoder | VQGAN, images: Tensor) -> np.ndarray:
    try:
        if isinstance(network, ClipEncoder):
            return network.encode_image(images).cpu().numpy().astype(np.float16)
        tokens = network.encode(images).cpu().numpy()
        return tokens.astype(np.uint16 if network.config.codebook_size <= 2**16 else np.int32)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory while encoding {len(images)} pictures; train with a smaller resolution"
        raise ValueError(message) from error


def _batches_in_time(pictures: Dataset, seconds: float, names: str) -> Iterator[Tensor]:
    """Batches until `seconds` have passed. Logs the progress and how many pictures the time allows."""
    began, logged, done, count = time.monotonic(), -inf, 0, len(pictures)
    for batch in loader_with_workers(pictures, batch_size=BATCH_SIZE):
        yield batch
        done, passed = done + len(batch), time.monotonic() - began
        is_last = done == count or passed >= seconds
        if is_last or passed - logged >= LOG_SECONDS:
            logged, reach = passed, min(count, max(done, done * seconds / passed))
            limit = f"; about {reach:,.0f} fit into {seconds / 60:.2g} minutes" if reach < count else ""
            log.info("%s: %s of %s views, %.0f a second%s", names, f"{done:,}", f"{count:,}", done / passed, limit)
        if is_last:
            return


def save_array(path: Path, rows: np.ndarray) -> None:
    """Writes a .npy completely or not at all. OSError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, durable=False) as temporary, open(temporary, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, rows.nbytes)  # numpy's own error for a full disk has no errno
        np.save(file, rows)


def find_neighbours(embeddings: Path, pictures: int, path: Path, seed: int) -> Path:
    """Writes the nearest rows of each row, nearest first, as a .npy of (N, K) int32, unless the file exists.

    Nearest is by cosine, among the rows of one random pool: comparing all rows would take quadratic time. Row r is a
    view of picture r % pictures (0: each row is a picture), and views of the same picture are no neighbours. Rows with
    fewer than K neighbours are filled up with themselves.
    """
    if rank_zero_only.rank:
        wait_for(path)
    if path.is_file():
        return path
    rows = np.load(embeddings, mmap_mode="r")
    order = np.random.default_rng(seed).permutation(len(rows))
    pools = np.array_split(order, -(-len(rows) // POOL_SIZE))
    neighbours = np.empty((len(rows), min(MAX_NEIGHBOURS, min(map(len, pools)))), np.int32)
    for pool in pools:
        directions = F.normalize(torch.from_numpy(rows[pool].astype(np.float32)), dim=1)
        picture = torch.from_numpy(pool % (pictures or len(rows)))
        similarity = (directions @ directions.T).masked_fill(picture[:, None] == picture, -2.0)
        values, nearest = similarity.topk(neighbours.shape[1], dim=1)
        neighbours[pool] = np.where(values > -2.0, pool[nearest.numpy()], pool[:, None])
    save_array(path, neighbours)
    return path
