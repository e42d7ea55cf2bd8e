"""kv_cache.py: attention over what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clip_gen.config import GPTConfig
from clip_gen.networks.kv_cache import EmbeddingBagCache, KVCache

CPU = torch.device("cpu")
SIZES = [(256, 4, 64), (64, 1, 16), (36, 3, 8), (225, 2, 8)]  # places, heads, channels of a head
LAYERS = 2


def config(places: int, heads: int, size: int) -> GPTConfig:
    return GPTConfig(n_layer=LAYERS, n_head=heads, n_embd=heads * size, block_size=places)


def given(places: int, heads: int, size: int, rows: int) -> Tensor:
    """Query, key and value for every place and layer: (T, L, 3, rows, H, D)."""
    return torch.randn(places, LAYERS, 3, rows, heads, size, generator=torch.Generator().manual_seed(places))


def found(cache: KVCache, steps: Tensor) -> Tensor:
    """What the queries of these steps find, (T, L, rows, H, D)."""
    answers = []
    for step in steps:
        answers.append(torch.stack([cache.attend(layer, *parts) for layer, parts in enumerate(step)]))
        cache.advance()
    return torch.stack(answers)


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_find_what_attention_finds_but_for_rounding(sizes: tuple[int, int, int]) -> None:
    steps = given(*sizes, rows=3).half().float()  # as it will be kept
    exact = found(KVCache(config(*sizes), 3, device=CPU, dtype=torch.float32), steps)
    summed = found(EmbeddingBagCache(config(*sizes), 3, device=CPU, dtype=torch.float16), steps)
    assert summed.dtype == torch.float32
    assert torch.allclose(summed, exact, atol=4e-3)
    assert not torch.allclose(summed[1:], exact[:-1], atol=0.1)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_row_finds_the_same_bits_alone_and_among_others(sizes: tuple[int, int, int]) -> None:
    steps = given(*sizes, rows=20)
    many = found(EmbeddingBagCache(config(*sizes), 20, device=CPU, dtype=torch.float16), steps)
    for rows in (slice(0, 1), slice(7, 11), slice(19, 20)):
        few = EmbeddingBagCache(config(*sizes), rows.stop - rows.start, device=CPU, dtype=torch.float16)
        assert torch.equal(found(few, steps[:, :, :, rows]), many[:, :, rows])
