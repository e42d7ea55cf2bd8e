"""metrics/features.py and the command `pull inception`."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bad_server import bad_server
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from clip_gen import ClipGen
from clip_gen.__main__ import main
from clip_gen.images import to_bytes
from clip_gen.metrics.features import choose_features, clip_features, inception_features, load_clip
from clip_gen.weights import download, pull

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published() -> bytes:
    """The published file with random weights: the network of torch-fidelity has the right names and shapes."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def inception(published: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pull inception` makes of it, over a connection that breaks once."""
    out = tmp_path_factory.mktemp("checkpoints") / "inception"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pull, "INCEPTION", replace(pull.INCEPTION, sha256=hashlib.sha256(published).hexdigest()))
        patch.setattr(download, "BACK_OFF_SECONDS", 0.001)
        with bad_server({pull.INCEPTION.name: published}, ["truncate"]) as server:
            assert main(["pull", "inception", "--out", str(out), "--mirror", server.address]) == 0
        assert [name for name, _ in server.requests] == [f"/{pull.INCEPTION.name}"] * 2
    return out


def test_pulled_inception_gives_the_features_of_torch_fidelity(
    published: bytes, inception: Path, tmp_path: Path
) -> None:
    record = json.loads((inception / "inception.json").read_text())["imported"]["inception"]
    assert record["sha256"] == hashlib.sha256(published).hexdigest()
    (tmp_path / "published.pth").write_bytes(published)
    path = str(tmp_path / "published.pth")
    layers = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = inception_features(inception / "inception.safetensors", CPU)
    found = network([images[:1], images[1:]])
    assert network.name == "InceptionV3 of the original FID (2048)"
    features, logits = theirs(to_bytes(images).permute(0, 3, 1, 2))
    assert torch.allclose(found, features, atol=1e-5)
    assert found.shape == (2, 2048)
    assert torch.allclose(network.classify(found), logits, atol=1e-5)


def test_features_are_inceptions_if_it_was_pulled_and_else_those_of_the_models_clip(
    inception: Path, tiny_model: ClipGen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder = tiny_model.clip_encoder
    monkeypatch.setenv("CLIP_GEN_INCEPTION", str(inception))
    assert choose_features("auto", encoder, "tiny", CPU).name.startswith("InceptionV3")
    assert choose_features("clip", encoder, "tiny", CPU).name == "CLIP of tiny (16)"
    monkeypatch.setenv("CLIP_GEN_INCEPTION", str(tmp_path))
    assert choose_features("auto", encoder, "tiny", CPU).name == "CLIP of tiny (16)"
    with pytest.raises(
        ValueError, match=r"inception\.safetensors: no such file; run .*python -m clip_gen pull inception"
    ):
        choose_features("inception", encoder, "tiny", CPU)
    (tmp_path / "inception.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"inception\.safetensors: damaged"):
        choose_features("auto", encoder, "tiny", CPU)


def test_another_network_in_the_place_of_inceptions_is_refused(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "inception.safetensors")  # of torchvision's
    with pytest.raises(ValueError, match=r"does not fit InceptionV3; run .*python -m clip_gen pull inception again"):
        inception_features(tmp_path / "inception.safetensors", CPU)


def test_clip_features_are_embeddings_of_any_model_folder(tiny_model: ClipGen, tiny_model_folder: Path) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = clip_features(load_clip(tiny_model_folder), "tiny")([images])
    assert torch.equal(found, tiny_model.clip_encoder.encode_image(images))
