"""batch_sizes.py: sizes of batches that do not change a candidate's bits."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.sampling.batch_sizes import (
    MAX_CPU_CANDIDATES,
    STANDARD_ROWS,
    TESTED_ROWS,
    bitwise_stable_sizes,
    max_candidates,
    padded_batch_size,
)
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens


class Unstable(nn.Linear):
    """A layer that rounds differently with fewer than `fewer`, more than `more`, or exactly `but` rows."""

    def __init__(self, linear: nn.Linear, fewer: int = 0, more: int = 10**6, but: int = 0):
        super().__init__(linear.in_features, linear.out_features)
        self.fewer, self.more, self.but = fewer, more, but

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        exact = (x.unsqueeze(-2) * self.weight).sum(dim=-1)
        return exact * (1 + 1e-6) if rows < self.fewer or rows > self.more or rows == self.but else exact


WITHOUT_32 = tuple(rows for rows in TESTED_ROWS if rows != 32)
LAYERS = ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc", "blocks.0.mlp.proj", "condition", "head")


def unstable(layer: str, **limits: int) -> GPT:
    """A transformer with one such layer."""
    gpt = GPT(TINY.gpt).eval()
    for name in LAYERS:
        parent, _, own = name.rpartition(".")
        holder = gpt.get_submodule(parent)
        setattr(holder, own, Unstable(getattr(holder, own), **(limits if name == layer else {})))
    return gpt


@pytest.mark.parametrize(
    ("limits", "numbers", "guided", "most"),
    [
        ({}, TESTED_ROWS, (1, 2, 4, 5, 6, 8, 10, 12, 16, 18, 20, 24, 32, 36), MAX_CPU_CANDIDATES),
        ({"fewer": 3}, TESTED_ROWS[2:], (4, 5, 6, 8, 10, 12, 16, 18, 20, 24, 32, 36), MAX_CPU_CANDIDATES),
        ({"fewer": 16}, TESTED_ROWS[8:], (16, 18, 20, 24, 32, 36), MAX_CPU_CANDIDATES),
        ({"fewer": 17}, TESTED_ROWS[:9], (STANDARD_ROWS,), STANDARD_ROWS),
        ({"more": 16}, TESTED_ROWS[:9], (STANDARD_ROWS,), STANDARD_ROWS),
        ({"more": 40}, TESTED_ROWS[:15], (1, 2, 4, 5, 6, 8, 10, 12, 16, 18, 20), STANDARD_ROWS),
        (
            {"but": 32},
            (*TESTED_ROWS[:12], *TESTED_ROWS[13:]),
            (1, 2, 4, 5, 6, 8, 10, 12, 18, 20, 24, 36),
            MAX_CPU_CANDIDATES,
        ),
        ({"but": 16}, (STANDARD_ROWS,), (STANDARD_ROWS,), STANDARD_ROWS),
    ],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_batch_sizes_are_those_that_round_alike(
    layer: str, limits: dict[str, int], numbers: tuple[int, ...], guided: tuple[int, ...], most: int
) -> None:
    gpt = unstable(layer, **limits)
    assert bitwise_stable_sizes(gpt) == numbers
    assert bitwise_stable_sizes(gpt, 2) == guided
    assert max_candidates(gpt) == most
    assert padded_batch_size(gpt, 1) == numbers[0]
    assert padded_batch_size(gpt, 16) == 16
    assert padded_batch_size(gpt, 16, 2) == (18 if "but" in limits and most == MAX_CPU_CANDIDATES else 16)
    assert padded_batch_size(gpt, 22) == (24 if 24 in numbers else 22)
    assert padded_batch_size(gpt, 100) == 100


def test_guidance_pads_both_passes_to_a_stable_size() -> None:
    gpt, embedding = unstable("head", but=32), F.normalize(torch.randn(16, 16), dim=1)
    rows: list[int] = []
    gpt.head.register_forward_hook(lambda module, given, made: rows.append(len(given[0])))
    sample_tokens(gpt, embedding, candidate_uniforms(0, range(16), 4), Sampling(guidance=2.0))
    assert rows[-4:] == [36] * 4


def test_bfloat16_has_one_batch_size() -> None:
    assert bitwise_stable_sizes(GPT(TINY.gpt).cast_for_inference(torch.bfloat16)) == (STANDARD_ROWS,)
