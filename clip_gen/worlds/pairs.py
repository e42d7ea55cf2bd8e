"""What the training data of all worlds share: pictures generated from a seed, and batches for CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_gen.networks.clip_encoder import Tokenizer
from clip_gen.worlds.clip_trainer import Batch

TRAINING = 1203  # part of the seed: training pictures differ from those of the command `shapes`
GROUP = 4  # pairs in a group


class SeededPictures(Dataset):
    """`count` pictures of `resolution` pixels a side; item i depends on the seed and i only."""

    def __init__(self, count: int, seed: int, resolution: int):
        self.count, self.seed, self.resolution = count, seed, resolution

    def __len__(self) -> int:
        return self.count

    def rng(self, index: int) -> np.random.Generator:
        """The random generator of item `index`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return np.random.default_rng([TRAINING, self.seed, index])


class PairGroup(NamedTuple):
    """A scene and near misses of it, with captions, and a spoilt picture of the scene.

    stated and shown: descriptions of what the captions say and of what the pictures show, in the world's own class.
    """

    pictures: np.ndarray  # (GROUP, S, S, 3) uint8
    captions: list[str]
    stated: list
    shown: list
    spoilt: np.ndarray  # (1, S, S, 3) uint8


class Collate:
    """Joins groups to a batch.

    fits: (n, n) bool for n stated and n shown descriptions: whether a caption is true of a picture. stated_answers and
    shown_answers: the answers of a description, as in Batch.
    """

    def __init__(
        self,
        context_length: int,
        fits: Callable[[Sequence, Sequence], Tensor],
        stated_answers: Callable[[object], list[int]],
        shown_answers: Callable[[object], list[int]],
    ):
        self.tokenize, self.fits = Tokenizer(context_length), fits
        self.stated_answers, self.shown_answers = stated_answers, shown_answers

    def __call__(self, groups: list[PairGroup]) -> Batch:
        pictures, captions, stated, shown, spoilt = zip(*groups, strict=True)
        captions, stated, shown = (list(chain.from_iterable(part)) for part in (captions, stated, shown))
        return Batch(
            pictures=torch.from_numpy(np.concatenate(pictures)),
            spoilt=torch.from_numpy(np.concatenate(spoilt)),
            tokens=self.tokenize(captions),
            is_true=self.fits(stated, shown),
            stated=torch.tensor([self.stated_answers(description) for description in stated]),
            shown=torch.tensor([self.shown_answers(description) for description in shown]),
        )
