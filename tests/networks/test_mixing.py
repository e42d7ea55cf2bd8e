"""mixing.py: embeddings between others."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clip_gen.networks.mixing import slerp, weighted_mean

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
