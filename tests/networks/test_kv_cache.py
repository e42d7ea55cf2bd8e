"""kv_cache.py: attention over cached keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clip_gen.config import GPTConfig
from clip_gen.networks.kv_cache import EmbeddingBagCache, KVCache

CPU = torch.device("cpu")
SIZES = [(256, 4, 64), (64, 1, 16), (36, 3, 8), (225, 2, 8)]  # positions, heads, channels of a head
LAYERS = 2


def config(positions: int, heads: int, size: int) -> GPTConfig:
    return GPTConfig(n_layer=LAYERS, n_head=heads, n_embd=heads * size, block_size=positions)


def random_steps(positions: int, heads: int, size: int, rows: int) -> Tensor:
    """Query, key and value for every position and layer: (T, L, 3, rows, H, D)."""
    return torch.randn(positions, LAYERS, 3, rows, heads, size, generator=torch.Generator().manual_seed(positions))


def attention_outputs(cache: KVCache, steps: Tensor) -> Tensor:
    """The attention outputs of these steps, (T, L, rows, H, D)."""
    outputs = []
    for step in steps:
        outputs.append(torch.stack([cache.attend(layer, *parts) for layer, parts in enumerate(step)]))
        cache.advance()
    return torch.stack(outputs)


@pytest.mark.parametrize("sizes", SIZES)
def test_embedding_bag_attention_equals_attention_but_for_rounding(sizes: tuple[int, int, int]) -> None:
    steps = random_steps(*sizes, rows=3).half().float()  # rounded like the cache
    exact = attention_outputs(KVCache(config(*sizes), 3, device=CPU, dtype=torch.float32), steps)
    summed = attention_outputs(EmbeddingBagCache(config(*sizes), 3, device=CPU, dtype=torch.float16), steps)
    assert summed.dtype == torch.float32
    assert torch.allclose(summed, exact, atol=4e-3)
    assert not torch.allclose(summed[1:], exact[:-1], atol=0.1)


@pytest.mark.parametrize("sizes", SIZES)
def test_attention_of_a_row_does_not_depend_on_the_batch(sizes: tuple[int, int, int]) -> None:
    steps = random_steps(*sizes, rows=20)
    many = attention_outputs(EmbeddingBagCache(config(*sizes), 20, device=CPU, dtype=torch.float16), steps)
    for rows in (slice(0, 1), slice(7, 11), slice(19, 20)):
        few = EmbeddingBagCache(config(*sizes), rows.stop - rows.start, device=CPU, dtype=torch.float16)
        assert torch.equal(attention_outputs(few, steps[:, :, :, rows]), many[:, :, rows])
