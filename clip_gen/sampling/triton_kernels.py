"""What is between the matrix products of a step, each in one kernel of Triton's; the only door to it.

A step for one token a row is so little work that the number of its kernels is what it takes. All is worked out in
float32, whatever it is kept in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

PLACES = 32  # of the cache, looked at together
CODES = 4096  # of the codebook, looked at together
NEVER = tl.constexpr(-1e30)  # a score no place has; of infinities the difference would not be a number


def check_toolchain() -> None:
    """Raises whatever Triton does where it cannot build what starts its kernels."""
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
    """What the one query of each row finds, (B, n_embd), at places 0 to `position` (1,), a number on the device.

    qkv: (B, 3 · n_embd), of which k and v are written to `position` of keys and values (B, H, T, D). rotation:
    (2, T, D), by which q and k turn.
    """
    rows, heads, length, size = keys.shape
    assert all(part.is_contiguous() for part in (qkv, keys, values))
    assert rotation is None or (rotation.is_contiguous() and rotation.shape[1] == length), rotation.shape
    out = torch.empty(rows, heads * size, device=qkv.device, dtype=qkv.dtype)
    sizes = length, heads, size, triton.next_power_of_2(size), PLACES
    _attend[(rows, heads)](qkv, rotation, keys, values, position, out, size**-0.5, *sizes, num_warps=4)
    return out


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """sampling.draw: the token (B,) at which the running sum of probabilities (B, V) passes uniform (B,)."""
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
def _turned(x, rotation, place, channel, inside, LENGTH: tl.constexpr, SIZE: tl.constexpr):
    """gpt.rotate of the head at x."""
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
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(position)
    channel = tl.arange(0, BLOCK)
    inside = channel < SIZE
    query = qkv + (row * 3 * HEADS + head) * SIZE
    if rotation is not None:
        q = _turned(query, rotation, place, channel, inside, LENGTH, SIZE)
        k = _turned(query + HEADS * SIZE, rotation, place, channel, inside, LENGTH, SIZE)
    else:
        q = tl.load(query + channel, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(query + HEADS * SIZE + channel, mask=inside, other=0.0).to(tl.float32)
    k = k.to(keys.dtype.element_ty)
    v = tl.load(query + 2 * HEADS * SIZE + channel, mask=inside, other=0.0).to(values.dtype.element_ty)
    first = (row * HEADS + head) * LENGTH * SIZE
    tl.store(keys + first + place * SIZE + channel, k, mask=inside)
    tl.store(values + first + place * SIZE + channel, v, mask=inside)

    # Each lane keeps a softmax of its own over every PLACES-th place, so that the loop waits for no other lane. The
    # token's own place is not read back: what other threads of the program store is not there yet.
    q = q * scale
    lane = tl.arange(0, PLACES)
    top = tl.full((PLACES,), NEVER, tl.float32)
    mass = tl.full((PLACES,), 0.0, tl.float32)
    sums = tl.full((PLACES, BLOCK), 0.0, tl.float32)
    start = 0
    while start < place:
        seen = start + lane < place
        at = first + (start + lane)[:, None] * SIZE + channel[None, :]
        mask = seen[:, None] & inside[None, :]
        earlier_k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        earlier_v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(q[None, :] * earlier_k, axis=1), NEVER)
        higher = tl.maximum(top, score)
        fade = tl.exp(top - higher)
        weight = tl.exp(score - higher)
        mass = mass * fade + weight
        sums = sums * fade[:, None] + weight[:, None] * earlier_v
        top = higher
        start += PLACES

    score = tl.sum(q * k.to(tl.float32), axis=0)
    highest = tl.maximum(tl.max(top, axis=0), score)
    fade = tl.exp(top - highest)  # 0 for a lane that saw no place
    weight = tl.exp(score - highest)
    found = tl.sum(sums * fade[:, None], axis=0) + weight * v.to(tl.float32)
    found = found / (tl.sum(mass * fade, axis=0) + weight)
    tl.store(out + (row * HEADS + head) * SIZE + channel, found, mask=inside)


# The column of the step that is drawn starts anywhere.
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
