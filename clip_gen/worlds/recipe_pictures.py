"""The pictures that the parts of a recipe are trained on, and their encodings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

from clip_gen.files import write_text_atomic
from clip_gen.training.datasets import EncodedPictures, JoinedRows, enough_places, open_rows
from clip_gen.training.encoding import encode_once, find_neighbours
from clip_gen.training.processes import wait_for
from clip_gen.worlds.pairs import SeededPictures
from clip_gen.worlds.recipe_config import RecipeConfig
from clip_gen.worlds.world import World

# Streams of pictures with different seeds, so that they have no picture in common.
PAIRS, PICTURES, ENCODED, UNSEEN, RANKED, HARD = STREAMS = range(6)


@dataclass(frozen=True)
class RecipePictures:
    """folder: of the encodings. encoder: a finished part's network, and what identifies its weights."""

    config: RecipeConfig
    world: World
    folder: Path
    encoder: Callable[[str], tuple[nn.Module, str]]

    def of(self, kind: type[SeededPictures], count: int, stream: int, side: int | None = None) -> SeededPictures:
        """`side` in pixels; None: the VQGAN's resolution."""
        return kind(count, len(STREAMS) * self.config.seed + stream, side or self.config.model.vqgan.resolution)

    def unseen(self) -> EncodedPictures:
        pictures = self.of(self.world.pictures, 1024, UNSEEN)
        return EncodedPictures(*self.encode("unseen", pictures, "clip", "vqgan"))

    def encoded(self, places: int | None = None) -> EncodedPictures:
        """The pictures that the transformer trains on, at `places` positions each or enough of them.

        Hard pictures are their own near misses, which do not count.
        """
        config, near_misses = self.config, None
        embeddings, tokens = self.encode_usual_and_hard("clip", "vqgan")
        if config.contrast:
            missed = self.of(self.world.near_misses, config.encoded_pictures, ENCODED)
            near_misses = self.encode("missed", missed, "clip")[0]
            if config.hard_pictures:
                near_misses = self.join(near_misses, self.encode("hard", self.hard(), "clip")[0])
        enough = enough_places(open_rows(tokens))
        neighbours = embeddings.with_name(f"neighbours-of-{embeddings.stem}.npy")
        return EncodedPictures(
            embeddings,
            tokens,
            noise=config.embedding_noise,
            dropout=config.condition_dropout,
            near_misses=near_misses,
            neighbours=find_neighbours(embeddings, 0, neighbours, config.seed) if config.condition_blur else None,
            blur=config.condition_blur,
            places=min(enough, places or enough),
        )

    def captioned(self) -> tuple[np.ndarray | JoinedRows, Callable[[int], tuple[str, ...]]]:
        """CLIP's embeddings of the same pictures, and the captions of a picture by its number."""
        usual, hard, captions = self.usual(), self.hard(), self.world.captions

        def captions_of(number: int) -> tuple[str, ...]:
            return captions(usual, number) if number < len(usual) else captions(hard, number - len(usual))

        return open_rows(self.encode_usual_and_hard("clip")[0]), captions_of

    def encode_usual_and_hard(self, *parts: str) -> list[Path]:
        paths = self.encode("train", self.usual(), *parts)
        if not self.config.hard_pictures:
            return paths
        return [self.join(*both) for both in zip(paths, self.encode("hard", self.hard(), *parts), strict=True)]

    def usual(self) -> SeededPictures:
        return self.of(self.world.pictures, self.config.encoded_pictures, ENCODED)

    def hard(self) -> SeededPictures:
        return self.of(self.world.hard_pictures, self.config.hard_pictures, HARD)

    def encode(self, name: str, pictures: SeededPictures, *parts: str) -> list[Path]:
        """Encodes the pictures by networks of this recipe; the file names tell for which weights."""
        networks, prints = zip(*map(self.encoder, parts), strict=True)
        names = [f"{part}-{print_}-{name}-{len(pictures)}.npy" for part, print_ in zip(parts, prints, strict=True)]
        paths = [self.folder / name for name in names]
        encode_once(pictures, dict(zip(paths, networks, strict=True)))
        return paths

    def join(self, first: Path, second: Path) -> Path:
        """A file that open_rows reads as the rows of two .npy files, one after the other."""
        joined = first.with_name(f"{first.stem}-and-{second.stem}.json")
        if not rank_zero_only.rank:
            write_text_atomic(joined, json.dumps({"files": [first.name, second.name]}))
        wait_for(joined)
        return joined
