"""Measures pictures of a model against real ones: reconstructions, and what it draws from pictures and from prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from clip_gen.evaluation.figures import CLOSE_TO_REAL, CLOSE_TO_TRAINING, Figure
from clip_gen.images import from_bytes
from clip_gen.metrics.clip_scores import clip_scores, retrieved
from clip_gen.metrics.distributions import cmmd, fid, kid
from clip_gen.metrics.features import FeatureNetwork, clip_features, weights_sha256
from clip_gen.metrics.inception_score import PARTS, inception_score
from clip_gen.metrics.intervals import Estimate, jackknife, mean, of_tenths, share
from clip_gen.metrics.neighbours import DENSITY_NEIGHBOURS, nearest, overlap, usual_distance
from clip_gen.metrics.reconstruction import similarities
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.networks.vqgan import VQGAN
from clip_gen.training.datasets import PictureFiles, loader_with_workers

BATCH = 32
ENOUGH_FOR_FID = 10_000  # pictures
MUCH_BIAS = 0.05  # of CMMD, a share of its value


@dataclass(frozen=True)
class Features:
    """Of a set of pictures: those of the feature network (N, D), and embeddings of the CLIP (N, E)."""

    features: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.features)


@dataclass
class Drawn:
    """Pictures that the model drew, and what was measured of each.

    neighbours: indices of their nearest training pictures; distances: to these, 1 being the usual distance.
    """

    paths: list[Path]
    measured: Features
    neighbours: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    distances: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))  # CLIP scores, from prompts only


class Measuring:
    """Measures sets of pictures, all with the same networks, and collects `figures`.

    network: whose features are compared. clip: for CMMD and CLIP scores; clip_name: of it.
    """

    def __init__(self, network: FeatureNetwork, clip: ClipEncoder, clip_name: str, device: torch.device):
        self.network, self.clip, self.device = network, clip, device
        self.clip_network, self.clip_weights = clip_features(clip, clip_name), weights_sha256(clip)
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
        self._fid(source, f"FID-{radius}", first, second)

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

    def drawn(self, source: str, drawn: Drawn, real: Features, training: Features, left_out: Tensor | None) -> None:
        """Adds the figures of drawn pictures, and sets their neighbours in `training`, which may be `real`.

        left_out: for each drawn picture the index of a training picture that does not count, (N,): the one from whose
        embedding it was drawn.
        """
        self._distances(source, real, drawn.measured)
        self._overlap(source, real, drawn.measured)
        distances, drawn.neighbours = nearest(drawn.measured.features, training.features, left_out)
        usual = usual_distance(training.features)
        drawn.distances = distances / usual if usual else distances
        name, note = CLOSE_TO_TRAINING, "50 % for new pictures of the same kind, 100 % for copies"
        if training is real:
            name, note = CLOSE_TO_REAL, f"{note}, if the model was trained on the real pictures"
        self._add(source, name, share(distances <= usual), self.network.name, len(drawn.paths), len(training), note)

    def prompts(self, source: str, drawn: Drawn, prompts: Sequence[str], texts: Tensor, bias: str) -> None:
        """Adds CLIP score and R-precision of pictures of prompts with embeddings (N, E), and sets their scores.

        bias: what to say beside them, for example that this CLIP chose the pictures.
        """
        images, name, count = drawn.measured.embeddings, self.clip_network.name, len(prompts)
        drawn.scores = clip_scores(images, texts)
        self._add(source, "CLIP score", mean(drawn.scores), name, count, 0, bias)
        choices = min(100, len(set(prompts)))
        note = "; ".join(filter(None, [f"chance: {100 / choices:.1f} %", bias]))
        self._add(source, "R-precision", share(retrieved(images, texts, prompts)), name, count, 0, note)

    def pictures(self, source: str, drawn: Drawn, originals: Tensor, bias: str) -> None:
        """Adds the CLIP score of pictures with the pictures from whose embeddings (N, E) they were drawn."""
        scores = clip_scores(drawn.measured.embeddings, originals)
        self._add(source, "CLIP score", mean(scores), self.clip_network.name, len(scores), 0, bias)

    def _distances(self, source: str, real: Features, measured: Features) -> None:
        """Distances of the sets, if both have two pictures or more."""
        name, counts = self.network.name, (len(measured), len(real))
        if min(counts) < 2:
            return
        self._fid(source, "FID", real.features, measured.features)
        self._add(source, "KID × 1000", kid(real.features, measured.features), name, *counts)
        found, bias = cmmd(real.embeddings, measured.embeddings)
        note = f"few pictures add {bias:.3f} to it" if bias > MUCH_BIAS * found.value else ""
        self._add(source, "CMMD", found, self.clip_network.name, *counts, note)
        if self.network.classify and len(measured) >= PARTS:
            scores = inception_score(measured.features, self.network.classify)
            note = "few pictures bias IS downwards" if len(measured) < ENOUGH_FOR_FID else ""
            self._add(source, "IS", of_tenths(scores), name, len(measured), 0, note)

    def _fid(self, source: str, metric: str, real: Tensor, measured: Tensor) -> None:
        dim, count = real.shape[1], min(len(real), len(measured))
        note = "few pictures bias FID upwards" if count < ENOUGH_FOR_FID else ""
        if count <= dim:
            note = f"fewer pictures than features ({dim}) bias FID upwards"
        estimate = jackknife(fid, real, measured)
        self._add(source, metric, estimate, self.network.name, len(measured), len(real), note)

    def _overlap(self, source: str, real: Features, measured: Features) -> None:
        """Precision, recall, density and coverage, if there are enough pictures."""
        if min(len(real), len(measured)) > DENSITY_NEIGHBOURS:
            found = overlap(real.features, measured.features)
            for metric, estimate in vars(found).items():
                self._add(source, metric, estimate, self.network.name, len(measured), len(real))

    def _add(self, source: str, metric: str, estimate: Estimate, features: str, *rest: object) -> None:
        figure = Figure.of(source, metric, estimate, features, *rest)
        weights = self.clip_weights if features == self.clip_network.name else ""
        self.figures.append(replace(figure, weights=weights))


def images_of(paths: Sequence[Path], resolution: int, device: torch.device) -> Iterator[Tensor]:
    """The central squares of picture files, in batches (B, 3, S, S) in [-1, 1]."""
    for batch in loader_with_workers(PictureFiles(paths, resolution), batch_size=BATCH):
        yield from_bytes(batch.to(device))
