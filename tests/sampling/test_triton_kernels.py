"""triton_kernels.py: each kernel equals plain torch; without a GPU in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.networks.grid import grid_rotation, rotate
from clip_gen.sampling import sampler
from clip_gen.sampling.cuda_graphs import StaticCache, fused_step

# Triton reads this when it is imported. Afterwards it cannot compile in the same process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16]

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402, needs Triton
from triton.compiler import ASTSource  # noqa: E402

from clip_gen.sampling import triton_kernels  # noqa: E402

here = pytest.mark.skipif(not INTERPRETED and not GPU, reason="by the interpreter, in a process of its own")


@pytest.mark.skipif(
    INTERPRETED, reason="this test starts the file in the interpreter; there it would start itself again"
)
def test_this_file_passes_with_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [  # the arguments in order: a type, or a compile-time constant
        ("_add_norm", ["*fp32", "*bf16", "*fp32", "*fp32", "*bf16", "fp32", 1024, 1024]),
        ("_add_norm", ["*fp32", "*fp32", "*fp32", "*fp32", "*fp32", "fp32", 192, 256]),
        ("_add_norm", ["*fp32", None, "*fp32", "*fp32", "*bf16", "fp32", 1024, 1024]),
        ("_attend", ["*bf16", "*fp32", "*bf16", "*bf16", "*i64", "*bf16", "fp32", 256, 16, 64, 64, 32]),
        ("_attend", ["*fp32", "*fp32", "*fp32", "*fp32", "*i64", "*fp32", "fp32", 256, 4, 48, 64, 32]),
        ("_attend", ["*bf16", None, "*bf16", "*bf16", "*i64", "*bf16", "fp32", 256, 16, 64, 64, 32]),
        ("_draw", ["*fp32", "*fp32", "*i64", "i32", "i32", 16384, 4096]),
    ],
)
def test_triton_compiles_the_kernels(
    kernel: str, arguments: list[str | int | None], capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    named = dict(zip(function.arg_names, arguments, strict=True))
    constants = {name: what for name, what in named.items() if not isinstance(what, str)}
    source = ASTSource(function, named | dict.fromkeys(constants, "constexpr"), constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed)).to(DEVICE, dtype)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-2


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48])
def test_add_norm_adds_to_the_stream_and_returns_its_norm(width: int, dtype: torch.dtype) -> None:
    stream, branch = noise(3, width), noise(3, width, dtype=dtype, seed=1)
    norm = nn.LayerNorm(width, device=DEVICE)
    norm.weight.data, norm.bias.data = noise(2, width, seed=2)
    summed = stream + branch
    with torch.no_grad():
        output = triton_kernels.add_norm(stream, branch, norm, dtype)
        assert torch.allclose(output.float(), norm(summed), atol=tolerance(dtype), rtol=tolerance(dtype))
    assert output.dtype == dtype
    assert torch.equal(stream, summed)


@here
def test_add_norm_without_a_branch_does_not_change_the_stream() -> None:
    stream, norm = noise(3, 16), nn.LayerNorm(16, device=DEVICE)
    before = stream.clone()
    with torch.no_grad():
        assert torch.allclose(triton_kernels.add_norm(stream, None, norm, torch.float32), norm(before), atol=1e-5)
    assert torch.equal(stream, before)


@here
@pytest.mark.parametrize("position", [0, 1, 31, 32, 40, 63])
@pytest.mark.parametrize(
    ("dtype", "size", "rotary"), [(DTYPES[0], 16, True), (DTYPES[0], 12, False), (DTYPES[1], 16, True)]
)
def test_attend_is_attention_over_the_positions_so_far(
    position: int, dtype: torch.dtype, size: int, rotary: bool
) -> None:
    shape = (2, 2, 64, size)
    qkv = noise(2, 3 * 2 * size, dtype=dtype)
    keys, values = (noise(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    rotation = grid_rotation(8, size).to(DEVICE) if rotary else None
    q, k, v = qkv.float().view(2, 3, 2, 1, size).unbind(1)
    if rotation is not None:
        q, k = (rotate(part, rotation[:, position : position + 1]) for part in (q, k))
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, :, position], expected_values[:, :, position] = k[:, :, 0].to(dtype), v[:, :, 0].to(dtype)
    seen = (part[:, :, : position + 1].float() for part in (expected_keys, expected_values))
    expected = F.scaled_dot_product_attention(q, *seen).reshape(2, -1)

    output = triton_kernels.attend(qkv, rotation, keys, values, torch.tensor([position], device=DEVICE))

    assert output.dtype == dtype
    assert torch.allclose(output.float(), expected, atol=tolerance(dtype), rtol=tolerance(dtype))
    assert torch.allclose(keys, expected_keys, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(values, expected_values)


@here
@pytest.mark.parametrize("codes", [32, 1000, 10000])
def test_draw_gives_the_tokens_of_sampler_draw(codes: int) -> None:
    # Sums of small whole numbers are exact in any order.
    probabilities = torch.randint(0, 3, (4, codes), generator=torch.manual_seed(0)).float()
    probabilities[:, -3:] = 0
    uniforms = torch.rand(4, 4, generator=torch.manual_seed(1))
    uniforms[:, 2], uniforms[:, 3] = 0.0, 1.0
    for uniform in uniforms.unbind(1):
        output = triton_kernels.draw(probabilities.to(DEVICE), uniform.to(DEVICE))
        assert torch.equal(output.cpu(), sampler.draw(probabilities, uniform))


@here
@pytest.mark.parametrize("rotary", [True, False])
def test_a_fused_step_gives_the_logits_of_a_plain_step(rotary: bool) -> None:
    torch.manual_seed(0)
    gpt = GPT(replace(TINY.gpt, block_size=9, rotary=rotary)).eval().to(DEVICE)
    x = noise(2, gpt.config.n_embd)
    growing, fixed = gpt.new_cache(x), StaticCache(gpt.config, 2, device=DEVICE, dtype=gpt.dtype)
    for _ in range(gpt.config.block_size):
        with torch.inference_mode():
            expected, output = gpt.step_from_input(x, growing), fused_step(gpt, x, fixed)
            assert torch.allclose(output, expected, atol=1e-5)
            x = gpt.token_embedding(expected.argmax(dim=1))
    assert torch.allclose(fixed.keys, growing.keys, atol=1e-5)
    assert fixed.position.item() == gpt.config.block_size
