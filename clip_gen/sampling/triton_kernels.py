"""Triton kernels for what is between the matrix products of a transformer step.

A step has one token per row, so its time depends on the number of kernels more than on their work. All kernels compute
in float32, whatever the dtype of their tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

LANES = 32  # positions of the cache in one iteration
CODES = 4096  # of the codebook in one iteration
MASKED = tl.constexpr(-1e30)  # a score; -inf - -inf would be NaN


def check_toolchain() -> None:
    """Raises Triton's error if it cannot compile here."""
    _ = triton.runtime.driver.active.utils


def add_norm(stream: Tensor, branch: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """Adds branch to stream (B, E), in place, and returns the stream's norm in `dtype`."""
    rows, width = stream.shape
    assert stream.is_contiguous()
    assert branch is None or branch.is_contiguous()
    out = torch.empty_like(stream, dtype=dtype)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](stream, branch, norm.weight, norm.bias, out, norm.eps, width, block, num_warps=4)
    return out


def attend(qkv: Tensor, rotation: Tensor | None, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Attention of one query per row over positions 0 to `position` (1,), a number on the device; (B, n_embd).

    qkv: (B, 3 · n_embd); k and v are written to `position` of keys and values (B, H, T, D). rotation: (2, T, D), for q
    and k.
    """
    rows, heads, length, size = keys.shape
    assert all(part.is_contiguous() for part in (qkv, keys, values))
    assert rotation is None or (rotation.is_contiguous() and rotation.shape[1] == length), rotation.shape
    out = torch.empty(rows, heads * size, device=qkv.device, dtype=qkv.dtype)
    sizes = length, heads, size, triton.next_power_of_2(size), LANES
    _attend[(rows, heads)](qkv, rotation, keys, values, position, out, size**-0.5, *sizes, num_warps=4)
    return out


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """As sampler.draw: the token (B,) at which the running sum of probabilities (B, V) passes uniform (B,)."""
    rows, codes = probabilities.shape
    assert probabilities.stride(1) == 1
    token = torch.empty(rows, dtype=torch.long, device=uniform.device)
    block = min(CODES, triton.next_power_of_2(codes))
    strides = probabilities.stride(0), uniform.stride(0)
    _draw[(rows,)](probabilities, uniform, token, *strides, codes, block, num_warps=8)
    return token


@triton.jit
def _add_norm(stream, branch, weight, bias, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + channel
    x = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        x += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(stream + at, x, mask=inside)
    apart = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    y = apart * tl.rsqrt(tl.sum(apart * apart, axis=0) / WIDTH + eps)
    y = y * tl.load(weight + channel, mask=inside) + tl.load(bias + channel, mask=inside)
    tl.store(out + at, y, mask=inside)


@triton.jit
def _rotated(x, rotation, place, channel, inside, LENGTH: tl.constexpr, SIZE: tl.constexpr):
    """grid.rotate, for the head at x."""
    itself = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(x + (channel + SIZE // 2) % SIZE, mask=inside, other=0.0).to(tl.float32)
    angle = rotation + place * SIZE + channel
    cosine = tl.load(angle, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(angle + LENGTH * SIZE, mask=inside, other=0.0).to(tl.float32)
    return itself * cosine + partner * sine


@triton.jit
def _attend(
    qkv,
    rotation,
    keys,
    values,
    position,
    out,
    scale,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(position)
    channel = tl.arange(0, BLOCK)
    inside = channel < SIZE
    query = qkv + (row * 3 * HEADS + head) * SIZE
    if rotation is not None:
        q = _rotated(query, rotation, place, channel, inside, LENGTH, SIZE)
        k = _rotated(query + HEADS * SIZE, rotation, place, channel, inside, LENGTH, SIZE)
    else:
        q = tl.load(query + channel, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(query + HEADS * SIZE + channel, mask=inside, other=0.0).to(tl.float32)
    k = k.to(keys.dtype.element_ty)
    v = tl.load(query + 2 * HEADS * SIZE + channel, mask=inside, other=0.0).to(values.dtype.element_ty)
    first = (row * HEADS + head) * LENGTH * SIZE
    tl.store(keys + first + place * SIZE + channel, k, mask=inside)
    tl.store(values + first + place * SIZE + channel, v, mask=inside)

    # Each lane has its own running softmax, over every LANES-th position, so the loop needs no reduction over lanes.
    # The new position is not read from memory, where other threads' stores may not be visible yet.
    q = q * scale
    lane = tl.arange(0, LANES)
    top = tl.full((LANES,), MASKED, tl.float32)
    mass = tl.full((LANES,), 0.0, tl.float32)
    sums = tl.full((LANES, BLOCK), 0.0, tl.float32)
    start = 0
    while start < place:
        seen = start + lane < place
        at = first + (start + lane)[:, None] * SIZE + channel[None, :]
        mask = seen[:, None] & inside[None, :]
        earlier_k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        earlier_v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(q[None, :] * earlier_k, axis=1), MASKED)
        higher = tl.maximum(top, score)
        fade = tl.exp(top - higher)
        weight = tl.exp(score - higher)
        mass = mass * fade + weight
        sums = sums * fade[:, None] + weight[:, None] * earlier_v
        top = higher
        start += LANES

    score = tl.sum(q * k.to(tl.float32), axis=0)
    highest = tl.maximum(tl.max(top, axis=0), score)
    fade = tl.exp(top - highest)  # 0 for a lane without positions
    weight = tl.exp(score - highest)
    found = tl.sum(sums * fade[:, None], axis=0) + weight * v.to(tl.float32)
    found = found / (tl.sum(mass * fade, axis=0) + weight)
    tl.store(out + (row * HEADS + head) * SIZE + channel, found, mask=inside)


# `uniform` is a column of a matrix, of any alignment.
@triton.jit(do_not_specialize_on_alignment=["uniform"])
def _draw(probabilities, uniform, token, STRIDE, UNIFORM_STRIDE, CODES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    probabilities += row * STRIDE
    total = 0.0
    last = 0
    for start in range(0, CODES, BLOCK):
        code = start + lane
        p = tl.load(probabilities + code, mask=code < CODES, other=0.0)
        total += tl.sum(p, axis=0)
        last = tl.maximum(last, tl.max(tl.where(p > 0, code, 0), axis=0))
    wanted = tl.load(uniform + row * UNIFORM_STRIDE) * total
    before = 0.0
    passed = 0
    for start in range(0, CODES, BLOCK):
        code = start + lane
        p = tl.load(probabilities + code, mask=code < CODES, other=0.0)
        not_yet = (before + tl.cumsum(p, axis=0) <= wanted) & (code < CODES)
        passed += tl.sum(not_yet.to(tl.int32), axis=0)
        before += tl.sum(p, axis=0)
    tl.store(token + row, tl.minimum(passed, last).to(tl.int64))
