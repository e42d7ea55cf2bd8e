"""mixing.py: embeddings between others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY, tiny_networks
from torch.nn import functional as F

from clip_gen.config import BridgeConfig, Completion
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.networks.mixing import embed_prompt, prompt_conditions, slerp, weighted_mean
from clip_gen.weights.model_folder import Networks

A, B = F.normalize(torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_slerp_turns_from_one_embedding_to_the_other_at_a_constant_rate() -> None:
    total = torch.acos((A * B).sum())
    for weight in (0.1, 0.25, 0.5, 0.9):
        mixed = slerp(A, B, weight)
        assert torch.allclose(mixed.norm(), torch.ones(()))
        assert torch.allclose(torch.acos((A * mixed).sum()), weight * total, atol=1e-4)
        assert torch.allclose(torch.acos((mixed * B).sum()), (1 - weight) * total, atol=1e-4)
        assert mixed.dtype == torch.float32


def test_slerp_has_exact_ends_and_accepts_equal_and_opposite_embeddings() -> None:
    assert torch.equal(slerp(A, B, 0), A)
    assert torch.equal(slerp(A, B, 1.0), B)
    assert torch.allclose(slerp(A, A, 0.3), A)
    assert slerp(A, -A, 0.3).isfinite().all()


def test_a_weighted_mean_has_unit_length_and_leaves_a_single_embedding_as_it_is() -> None:
    assert torch.equal(weighted_mean(A, [1.0]), A)
    mean = weighted_mean(torch.cat([A, B]), [0.75, 0.25])
    assert torch.allclose(mean, F.normalize(3 * A + B, dim=-1), atol=1e-6)
    with pytest.raises(ValueError, match="cancel out"):
        weighted_mean(torch.cat([A, -A]), [0.5, 0.5])


GROUNDS = Completion(["on red", "on blue"], unless=["on red", "on blue"])
RELATIONS = Completion(["above"], replaces=["and"])


@pytest.fixture(scope="module")
def networks() -> Networks:
    """With completions, and a memory of this CLIP's embedding of "a star" and of others."""
    config = replace(TINY, bridge=BridgeConfig(memory=8, memory_axes=8, completions=[GROUNDS, RELATIONS]))
    networks = tiny_networks(config=config)
    others = F.normalize(torch.randn(7, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    networks.bridge.memory.fill(torch.cat([networks.clip.encode_text(["a star"]), others]))
    return networks


def conditions(networks: Networks, prompt: str, chances: list[float]) -> torch.Tensor:
    embedding = embed_prompt(networks.clip, networks.bridge, prompt)
    return prompt_conditions(networks.clip, networks.bridge, prompt, embedding, torch.tensor(chances))


def test_a_prompt_that_no_remembered_picture_fits_is_completed(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bridge, "fits", lambda bridge, embedding: False)
    red, blue = networks.clip.encode_text(["a star on red", "a star on blue"])
    assert torch.equal(conditions(networks, "a star", [0.7, 0.1, 0.6]), torch.stack([blue, red, blue]))
    assert torch.equal(conditions(networks, "a star", [0.1]), red[None])
    for said in ("a star on blue", "a star | on red", "a star " * 30):  # the last: the CLIP reads no more
        near = networks.bridge.conditions(embed_prompt(networks.clip, networks.bridge, said), torch.tensor([[0.2]]))
        assert torch.equal(conditions(networks, said, [0.2]), near)


def test_all_parts_of_a_prompt_get_the_same_phrases(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bridge, "fits", lambda bridge, embedding: False)
    both = networks.clip.encode_text(["a star above a heart on blue", "a ring on blue"])
    found = conditions(networks, "a star and a heart:3 | a ring", [0.2, 0.9])
    assert torch.equal(found[1:], weighted_mean(both, [0.75, 0.25]))
    nearly = conditions(networks, "a star:0.9999 | a ring:0.0001", [0.2, 0.9])
    assert torch.allclose(nearly, conditions(networks, "a star:1 | a ring:0", [0.2, 0.9]), atol=1e-3)


def test_a_prompt_that_a_remembered_picture_fits_is_not_completed_unless_words_are_replaced(
    networks: Networks,
) -> None:
    star = embed_prompt(networks.clip, networks.bridge, "a star")
    assert networks.bridge.fits(star)
    assert torch.equal(conditions(networks, "a star", [0.2]), networks.bridge.conditions(star, torch.tensor([[0.2]])))
    pair = networks.clip.encode_text(["a star above a star on red"])
    assert torch.equal(conditions(networks, "a star and a star", [0.2]), pair)


def test_a_training_drops_the_completions_of_its_base(networks: Networks) -> None:
    bridge = Bridge(16, networks.config.bridge).without_memory()
    assert bridge.config == BridgeConfig(memory_axes=8)
    assert not bridge.fits(A)


def test_every_text_is_encoded_once(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], ClipEncoder.encode_text
    monkeypatch.setattr(ClipEncoder, "encode_text", lambda clip, texts: encoded.extend(texts) or encode(clip, texts))
    monkeypatch.setattr(Bridge, "fits", lambda bridge, embedding: False)
    conditions(networks, "a heart", [i / 16 for i in range(16)])
    assert sorted(encoded) == ["a heart", "a heart on blue", "a heart on red"]
