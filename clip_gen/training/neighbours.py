"""Images with similar CLIP embeddings, for near misses and blurred conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.nn import functional as F

from clip_gen.training.encoding import new_array
from clip_gen.training.processes import wait_for

POOL_SIZE, MAX_NEIGHBOURS = 2048, 64


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
    count = min(MAX_NEIGHBOURS, min(map(len, pools)))
    with new_array(path, (len(rows), count), np.int32) as neighbours:
        for pool in pools:
            directions = F.normalize(torch.from_numpy(rows[pool].astype(np.float32)), dim=1)
            picture = torch.from_numpy(pool % (pictures or len(rows)))
            similarity = (directions @ directions.T).masked_fill(picture[:, None] == picture, -2.0)
            values, nearest = similarity.topk(count, dim=1)
            neighbours[pool] = np.where(values > -2.0, pool[nearest.numpy()], pool[:, None])
    return path
