"""The networks whose features the metrics compare: InceptionV3 in the weights of the original FID, or a CLIP."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_gen.files import MODULE
from clip_gen.images import to_bytes
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.weights.default_model import inception_weights
from clip_gen.weights.model_folder import load_config, load_part, read_tensors

PULL = f"{MODULE} pull inception"
INSTALL = "pip install torch-fidelity==0.4.0"


@dataclass(frozen=True)
class FeatureNetwork:
    """name: in reports, since figures with different features do not compare. extract: images (B, 3, S, S) in [-1, 1]
    to features (B, D) float32. classify: features (B, D) to logits (B, C), on the CPU; None: it has no classes.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, batches: Iterable[Tensor]) -> Tensor:
        """The features (N, D) of all batches, on the CPU."""
        return torch.cat([self.extract(images).float().cpu() for images in batches])


def clip_features(encoder: ClipEncoder, name: str) -> FeatureNetwork:
    """Unit-length embeddings of a CLIP."""
    return FeatureNetwork(f"CLIP of {name} ({encoder.config.embed_dim})", encoder.encode_image)


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of all weights as float32: the same whether a file has them as float16 or float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def inception_features(weights: Path, device: torch.device) -> FeatureNetwork:
    """The 2,048 pooled features of InceptionV3 as in the original FID, and the logits of the original inception score,
    which have no bias. ValueError if they cannot be computed here.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(f"InceptionV3 features need torch-fidelity; run {INSTALL}, or give --features clip")
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; run {PULL}, or give --features clip")
    network = _inception(weights).to(device)

    def extract(images: Tensor) -> Tensor:
        return network(to_bytes(images).permute(0, 3, 1, 2))[0]

    def classify(features: Tensor) -> Tensor:
        return features @ network.fc.weight.T.cpu()

    return FeatureNetwork("InceptionV3 of the original FID (2048)", extract, classify)


def choose_features(chosen: str, encoder: ClipEncoder, name: str, device: torch.device) -> FeatureNetwork:
    """The network for "inception", "clip", which is the encoder with this name, or "auto": InceptionV3 if pulled."""
    weights = inception_weights()
    if chosen == "clip" or (chosen == "auto" and not weights.is_file()):
        return clip_features(encoder, name)
    return inception_features(weights, device)


def load_clip(folder: Path) -> ClipEncoder:
    """The CLIP of a model folder, which may hold nothing else. ModelFolderError if it cannot be used."""
    encoder = ClipEncoder(load_config(folder).clip)
    load_part(encoder, folder / "clip.safetensors")
    return encoder


def _inception(weights: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # It reads a pickle, so it gets one that is made here of tensors alone.
    file = io.BytesIO()
    torch.save(read_tensors(weights), file)
    file.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    except RuntimeError as error:
        raise ValueError(f"{weights}: does not fit InceptionV3; run {PULL} again") from error
