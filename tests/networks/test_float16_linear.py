"""float16_linear.py: linear layers with float16 weights on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FLOAT16, TINY
from torch import nn
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.hardware import choose_dtype, supports_float16
from clip_gen.networks.float16_linear import Float16Linear
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.batcher import batch_bytes
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens

CPU = torch.device("cpu")


@FLOAT16
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_exact_for_weights_that_fit_float16(bias: bool) -> None:
    torch.manual_seed(0)
    rounded, x = nn.Linear(256, 96, bias=bias), torch.randn(5, 7, 256)
    output = Float16Linear(rounded)(x)
    off = (output - rounded(x)).abs().max()
    with torch.no_grad():
        rounded.weight.copy_(rounded.weight.half())
    assert output.shape == (5, 7, 96)
    assert output.dtype == torch.float32
    assert torch.allclose(output, rounded(x), atol=2e-6)
    assert 1e-5 < off < 1e-3


@FLOAT16
def test_weights_beyond_the_float16_range_are_clamped() -> None:
    linear = nn.Linear(16, 1, bias=False)
    nn.init.constant_(linear.weight, -1e6)
    assert Float16Linear(linear)(torch.eye(16)[:3]).tolist() == [[-65504.0]] * 3
    assert linear.weight.tolist() == [[-1e6] * 16]


@FLOAT16
def test_float16_is_the_default_without_bfloat16_hardware(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    exact, model = (ClipGen.load(tiny_model_folder, "cpu", dtype) for dtype in ("float32", None))
    gpt = model.gpt
    packed = [module for module in gpt.modules() if isinstance(module, Float16Linear)]
    assert len(packed) == 4 * gpt.config.n_layer + 1
    cache = gpt.new_cache(torch.zeros(16, gpt.config.n_embd))
    assert cache.keys.dtype == torch.float16
    logits = 16 * gpt.config.codebook_size * 48
    assert batch_bytes(gpt, Sampling(), 16) == cache.keys.nbytes + cache.values.nbytes + logits

    embedding = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    tokens = torch.randint(0, 32, (4, 15), generator=torch.Generator().manual_seed(1))
    true = exact.gpt(embedding, tokens)
    assert torch.allclose(true, gpt(embedding, tokens), atol=0.002 * float(true.std()))
    tokens = [m.generate("a red circle", 3, 3, seed=1).tokens for m in (exact, model)]
    assert torch.equal(*tokens)


@FLOAT16
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("width", "heads"), [(256, 4), (36, 3)])
def test_logits_of_a_candidate_do_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch, width: int, heads: int, guidance: float
) -> None:
    monkeypatch.setattr("clip_gen.sampling.sampler.window_length", lambda *given: 1)
    torch.manual_seed(0)
    switches = dict.fromkeys(("neighbour_context", "head_bias", "rotary", "sketch_drawings"), 1)
    config = replace(TINY.gpt, n_embd=width, n_head=heads, **switches)
    gpt = GPT(config).eval().cast_for_inference(torch.float16)
    embedding, uniforms = F.normalize(torch.randn(32, 16), dim=1), candidate_uniforms(0, range(32), 4)
    seen: list[torch.Tensor] = []
    step = gpt.step
    gpt.step = lambda *given: seen.append(step(*given)) or seen[-1]

    def logits(count: int) -> list[torch.Tensor]:
        """Logits of `count` candidates, (steps, count, V); with guidance also the unconditional ones."""
        seen.clear()
        sample_tokens(gpt, embedding[:count], uniforms[:count], Sampling(guidance=guidance))
        steps = torch.stack(seen)
        return [steps[:, :count]] if guidance == 1 else [steps[:, :count], steps[:, count : 2 * count]]

    logits_of_32 = logits(32)
    for count in (1, 5, 9, 16, 20):
        for few, many in zip(logits(count), logits_of_32, strict=True):
            assert torch.equal(few, many[:, :count])


@FLOAT16
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("width", [3, 4, 5, 20, 129, 516])
def test_any_width_works(width: int, rows: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 32), torch.randn(rows, width)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.half())
    assert torch.allclose(Float16Linear(linear)(x), linear(x), atol=3e-6)


def test_float16_needs_a_cpu_that_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='dtype is "float16", which needs an x86 CPU with AVX2; give "auto"'):
        choose_dtype("float16", torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert choose_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr("clip_gen.hardware.supports_float16", lambda: True)
    assert choose_dtype("float16", CPU) == choose_dtype("auto", CPU) == torch.float16
    monkeypatch.setattr("clip_gen.hardware.supports_float16", lambda: False)
    assert choose_dtype("auto", CPU) == torch.float32
    with pytest.raises(ValueError, match='dtype is "float16", which needs an x86 CPU with AVX2'):
        choose_dtype("float16", CPU)


def test_x86_with_avx2_supports_float16() -> None:
    assert supports_float16() == bool(torch.cpu.get_capabilities().get("avx2"))
