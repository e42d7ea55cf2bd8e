"""bridge.py: noise and mean shift."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from clip_gen.config import BridgeConfig
from clip_gen.networks.bridge import Bridge, add_noise


def unit(rows: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_without_a_shift_embeddings_do_not_change() -> None:
    assert torch.allclose(Bridge(64, BridgeConfig())(unit(3)), unit(3))


def test_a_shift_of_one_moves_the_text_mean_to_the_image_mean() -> None:
    text = F.normalize(unit(500) + 3 * unit(1, seed=1), dim=-1)
    image_mean = 0.5 * unit(1, seed=2)[0]
    bridge = Bridge(64, BridgeConfig(mean_shift=1.0))
    bridge.text_mean.copy_(text.mean(dim=0))
    bridge.image_mean.copy_(image_mean)
    moved = bridge(text)
    assert torch.allclose(moved.norm(dim=1), torch.ones(500))
    assert F.cosine_similarity(moved.mean(dim=0), image_mean, dim=0) > 0.99
    assert F.cosine_similarity(text.mean(dim=0), image_mean, dim=0) < 0.5


def test_noise_has_the_given_strength() -> None:
    clean = unit(2000)
    assert torch.allclose(add_noise(clean, 0.0), clean)
    for strength in (0.3, 1.0, 3.0):
        noisy = add_noise(clean, strength, torch.Generator().manual_seed(3))
        assert torch.allclose(noisy.norm(dim=1), torch.ones(2000))
        expected = 1 / (1 + strength**2) ** 0.5
        assert abs((noisy * clean).sum(dim=1).mean() - expected) < 0.02


def test_strength_may_differ_by_row() -> None:
    noisy = add_noise(unit(2), torch.tensor([[0.0], [1.0]]))
    assert torch.allclose(noisy[0], unit(2)[0])
    assert not torch.allclose(noisy[1], unit(2)[1], atol=0.1)
