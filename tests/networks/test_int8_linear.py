"""int8_linear.py: matrices in eight bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.config import GPTConfig
from clip_gen.hardware import choose_dtype, prefers_bfloat16
from clip_gen.networks.gpt import GPT
from clip_gen.networks.int8_linear import Int8Linear
from clip_gen.sampling.batcher import batch_bytes
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_off_by_no_more_than_eight_bits_cost(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 96, bias=bias)
    with torch.no_grad():
        linear.weight[3] *= 50  # a step of its own keeps such a row from spoiling the others
        linear.weight[4] = 0
    x = torch.randn(5, 7, 256)
    exact, quick = linear(x), Int8Linear(linear)(x)
    assert quick.shape == exact.shape
    assert quick.dtype == torch.bfloat16
    off = (quick.float() - exact).square().mean(dim=(0, 1)).sqrt()
    size = exact.square().mean(dim=(0, 1)).sqrt()
    assert (off[size > 0] < 0.015 * size[size > 0]).all()
    assert off.max() > 0


def test_it_gives_the_type_that_is_asked_for() -> None:
    linear, x = nn.Linear(32, 16), torch.randn(2, 32)
    exact, coarse = Int8Linear(linear, torch.float32)(x), Int8Linear(linear, torch.bfloat16)(x)
    assert exact.dtype == torch.float32
    assert coarse.dtype == torch.bfloat16
    assert torch.allclose(exact, coarse.float(), atol=0.02)


def test_a_width_that_torch_would_read_past_is_refused() -> None:
    with pytest.raises(ValueError, match='multiples of 16 as widths, and one here is 20; give "auto"'):
        Int8Linear(nn.Linear(20, 32))


@pytest.mark.parametrize("neighbour_context", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_row_has_the_same_bits_alone_and_among_others(guidance: float, neighbour_context: bool) -> None:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=9, codebook_size=512, embed_dim=128, rotary=True)
    gpt = GPT(replace(config, neighbour_context=neighbour_context)).eval().cast_for_inference(torch.int8)
    embedding, uniforms = F.normalize(torch.randn(40, 128), dim=1), candidate_uniforms(0, range(40), 9)
    seen: list[torch.Tensor] = []
    step = gpt.step
    gpt.step = lambda *given: seen.append(step(*given)) or seen[-1]

    def logits(first: int, count: int) -> torch.Tensor:
        seen.clear()
        rows = slice(first, first + count)
        sample_tokens(gpt, embedding[rows], uniforms[rows], Sampling(guidance=guidance))
        return torch.stack(seen)[:, :count]

    every = logits(0, 40)
    for first, count in ((0, 1), (5, 1), (3, 2), (7, 5), (0, 16), (11, 17)):
        few = logits(first, count)
        assert len(seen[0]) == count * (1 if guidance == 1 else 2)  # no row is there to fill up
        assert torch.equal(few, every[:, first : first + count])


def test_a_model_draws_in_it(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, model = (ClipGen.load(tiny_model_folder, "cpu", dtype) for dtype in ("float32", "int8"))
    gpt = model.gpt
    assert {block.attn.qkv.weight.dtype for block in gpt.blocks} == {gpt.head.weight.dtype} == {torch.int8}
    cache = gpt.new_cache(16)
    assert cache.keys.dtype == (torch.bfloat16 if prefers_bfloat16(model.device) else torch.float32)
    logits = 16 * gpt.config.codebook_size * 48
    assert batch_bytes(gpt, Sampling(), 16) == cache.keys.nbytes + cache.values.nbytes + logits

    embedding = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    tokens = torch.randint(0, 32, (4, 15), generator=torch.Generator().manual_seed(1))
    true = exact.gpt(embedding, tokens)
    assert 0 < (true - gpt(embedding, tokens)).abs().max() < 0.05 * true.std()

    monkeypatch.setenv("CLIP_GEN_DTYPE", "int8")
    again = ClipGen.load(tiny_model_folder, "cpu")
    pictures = [m.generate("a red circle", 3, 3, seed=1).images[0].tobytes() for m in (model, again)]
    assert pictures[0] == pictures[1]


def test_it_is_for_cpus() -> None:
    assert choose_dtype("int8", torch.device("cpu")) == torch.int8
    with pytest.raises(ValueError, match='dtype is "int8", which is for CPUs; on a GPU give "auto"'):
        choose_dtype("int8", torch.device("cuda"))
