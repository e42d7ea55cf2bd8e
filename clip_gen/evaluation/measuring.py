"""Measures pictures of a model against real ones: reconstructions, and what it draws from pictures and from prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from clip_gen.evaluation.figures import Figure
from clip_gen.images import from_bytes
from clip_gen.metrics.clip_scores import clip_scores, retrieved
from clip_gen.metrics.distributions import cmmd_with_interval, fid, kid
from clip_gen.metrics.features import FeatureNetwork, clip_features
from clip_gen.metrics.inception_score import PARTS, inception_score
from clip_gen.metrics.intervals import Estimate, jackknife, mean, of_tenths, share
from clip_gen.metrics.neighbours import DENSITY_NEIGHBOURS, is_close, nearest, overlap
from clip_gen.metrics.reconstruction import similarities
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.datasets import PictureFiles, loader_with_workers

BATCH = 32
ENOUGH_FOR_FID = 10_000  # pictures


@dataclass(frozen=True)
class Features:
    """Of a set of pictures: those of the feature network (N, D), and embeddings of the CLIP (N, E)."""

    features: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.features)


@dataclass
class Drawn:
    """Pictures that the model drew, what was measured of each, and the indices of their nearest training pictures."""

    paths: list[Path]
    measured: Features
    neighbours: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))  # CLIP scores, from prompts only


class Measuring:
    """Measures sets of pictures, all with the same networks, and collects `figures`.

    network: whose features are compared. clip: for CMMD and CLIP scores; clip_name: of it. bias: what to say beside
    CLIP scores, for example that this CLIP chose the pictures.
    """

    def __init__(self, network: FeatureNetwork, clip: ClipEncoder, clip_name: str, device: torch.device, bias: str):
        self.network, self.clip, self.device, self.bias = network, clip, device, bias
        self.clip_network = clip_features(clip, clip_name)
        self.figures: list[Figure] = []

    def features(self, batches: Iterator[Tensor]) -> Features:
        """Of batches of images (B, 3, S, S) in [-1, 1]; only their features are kept."""
        same, found, embeddings = self.network.name == self.clip_network.name, [], []
        for images in batches:
            embeddings.append(self.clip_network([images]))
            found.append(embeddings[-1] if same else self.network([images]))
        return Features(torch.cat(found), torch.cat(embeddings))

    def of_files(self, paths: Sequence[Path], resolution: int) -> Features:
        return self.features(images_of(paths, resolution, self.device))

    def blurred(self, source: str, radius: int, real: Sequence[Path], drawn: Sequence[Path], resolution: int) -> None:
        """Adds FID after a Gaussian blur of both sets with this radius in pixels, as DALL-E's and CogView's papers do:
        a VQGAN's fine detail counts less.
        """
        size = 2 * 3 * radius + 1
        first, second = (
            self.network(gaussian_blur(images, size, radius) for images in images_of(paths, resolution, self.device))
            for paths in (real, drawn)
        )
        self._distance(source, f"FID-{radius}", fid, first, second, self.network.name)

    def reconstructions(
        self, vqgan: VQGAN, paths: Sequence[Path], resolution: int, real: Features, lpips: FrozenLPIPS | None
    ) -> Tensor:
        """Adds the figures of reconstructed pictures; returns each one's PSNR (N,)."""
        scores: list[dict[str, Tensor]] = []

        def reconstructed() -> Iterator[Tensor]:
            for images in images_of(paths, resolution, self.device):
                decoded = vqgan.decode(vqgan.encode(images)).clamp(-1, 1)
                scores.append({name: part.cpu() for name, part in similarities(decoded, images, lpips).items()})
                yield decoded

        source = "reconstructions"
        with torch.inference_mode():
            measured = self.features(reconstructed())
        joined = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
        for name, values in joined.items():
            self._add(source, name, mean(values), "LPIPS (VGG-16)" if name == "LPIPS" else "pixels", len(values))
        self._distances(source, real, measured)
        return joined["PSNR"]

    def drawn(self, source: str, drawn: Drawn, real: Features, training: Features) -> None:
        """Adds the figures of drawn pictures, and sets their neighbours."""
        self._distances(source, real, drawn.measured)
        self._overlap(source, real, drawn.measured)
        distances, drawn.neighbours = nearest(drawn.measured.features, training.features)
        close = share(is_close(distances[:, 0], training.features))
        note = "50 % for new pictures of the same kind, 100 % for copies"
        self._add(
            source, "close to a training picture", close, self.network.name, len(drawn.paths), len(training), note
        )

    def prompts(self, source: str, drawn: Drawn, prompts: Sequence[str], texts: Tensor) -> None:
        """Adds CLIP score and R-precision of pictures of prompts with embeddings (N, E), and sets their scores."""
        images, name, count = drawn.measured.embeddings, self.clip_network.name, len(prompts)
        drawn.scores = clip_scores(images, texts)
        self._add(source, "CLIP score", mean(drawn.scores), name, count, 0, self.bias)
        choices = min(100, len(set(prompts)))
        note = "; ".join(filter(None, [f"chance: {100 / choices:.1f} %", self.bias]))
        self._add(source, "R-precision", share(retrieved(images, texts, prompts)), name, count, 0, note)

    def pictures(self, source: str, drawn: Drawn, originals: Tensor) -> None:
        """Adds the CLIP score of pictures with the pictures from whose embeddings (N, E) they were drawn."""
        scores = clip_scores(drawn.measured.embeddings, originals)
        self._add(source, "CLIP score", mean(scores), self.clip_network.name, len(scores), 0, self.bias)

    def _distances(self, source: str, real: Features, measured: Features) -> None:
        name, dim, count = self.network.name, real.features.shape[1], min(len(real), len(measured))
        note = "few pictures bias FID upwards" if count < ENOUGH_FOR_FID else ""
        if count <= dim:
            note = f"fewer pictures than features ({dim}) bias FID upwards"
        self._distance(source, "FID", fid, real.features, measured.features, name, note)
        self._distance(source, "KID × 1000", _kid_times_1000, real.features, measured.features, name)
        found = cmmd_with_interval(real.embeddings, measured.embeddings)
        self._add(source, "CMMD", found, self.clip_network.name, len(measured), len(real))
        if self.network.classify and len(measured) >= PARTS:
            scores = inception_score(measured.features, self.network.classify)
            note = "few pictures bias IS downwards" if len(measured) < ENOUGH_FOR_FID else ""
            self._add(source, "IS", of_tenths(scores), name, len(measured), 0, note)

    def _distance(
        self,
        source: str,
        metric: str,
        distance: Callable[[Tensor, Tensor], float],
        real: Tensor,
        other: Tensor,
        features: str,
        note: str = "",
    ) -> None:
        self._add(source, metric, jackknife(distance, real, other), features, len(other), len(real), note)

    def _overlap(self, source: str, real: Features, measured: Features) -> None:
        """Precision, recall, density and coverage, if there are enough pictures."""
        if min(len(real), len(measured)) <= DENSITY_NEIGHBOURS:
            return
        found = overlap(real.features, measured.features)
        estimates = {
            "precision": share(found.precise),
            "recall": share(found.recalled),
            "density": mean(found.density),
            "coverage": share(found.covered),
        }
        for metric, estimate in estimates.items():
            self._add(source, metric, estimate, self.network.name, len(measured), len(real))

    def _add(self, source: str, metric: str, estimate: Estimate, *rest: object) -> None:
        self.figures.append(Figure.of(source, metric, estimate, *rest))


def _kid_times_1000(real: Tensor, generated: Tensor) -> float:
    return 1000 * kid(real, generated)


def images_of(paths: Sequence[Path], resolution: int, device: torch.device) -> Iterator[Tensor]:
    """The central squares of picture files, in batches (B, 3, S, S) in [-1, 1]."""
    for batch in loader_with_workers(PictureFiles(paths, resolution), batch_size=BATCH):
        yield from_bytes(batch.to(device))
