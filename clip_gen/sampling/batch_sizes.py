"""How many rows a batch has, so that a candidate's bits do not depend on the other candidates in its batch.

On a CPU a matrix product may take another code path for another number of rows, which rounds differently: by 1e-6 with
AVX2, which sometimes changes a token. So batches are padded to a number of rows that was found to round like the others
on this CPU. On a GPU the numbers are chosen for speed alone, and a picture may depend on its batch.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clip_gen.networks.gpt import GPT

STANDARD_ROWS = 16  # always allowed; the only allowed number if no larger one rounds alike
TESTED_ROWS = (1, 2, 4, 5, 6, 8, 10, 12, 16, 18, 20, 24, 32, 36, 40, 48, 64, 72)  # multiples of 6 suit FBGEMM
MAX_CPU_CANDIDATES = 32  # in a batch; with guidance each takes two rows
MAX_GPU_CANDIDATES = 64  # a GPU reads all weights in every step, whatever the number of rows


def max_candidates(gpt: GPT) -> int:
    """The largest number of candidates in one batch."""
    if gpt.device.type == "cuda":
        return MAX_GPU_CANDIDATES
    largest = min(bitwise_stable_sizes(gpt, passes)[-1] for passes in (1, 2))
    return MAX_CPU_CANDIDATES if largest >= MAX_CPU_CANDIDATES else STANDARD_ROWS


def padded_batch_size(gpt: GPT, candidates: int, passes: int = 1) -> int:
    """The rows for so many candidates in each pass through the transformer; guidance takes 2 passes.

    Beyond the largest stable size: `candidates`.
    """
    if gpt.device.type == "cuda":
        return STANDARD_ROWS if candidates <= STANDARD_ROWS else max(candidates, MAX_GPU_CANDIDATES)
    return next((size for size in bitwise_stable_sizes(gpt, passes) if size >= candidates), candidates)


def bitwise_stable_sizes(gpt: GPT, passes: int = 1) -> tuple[int, ...]:
    """The sizes of TESTED_ROWS, ascending, that give a row the same bits in all products of this transformer.

    With two passes a size is stable if the doubled one is too, since both passes are one product. Tested once for each
    transformer, so call it after cast_for_inference. In bfloat16 only STANDARD_ROWS: its coarse rounding would hide
    most differences from the test.
    """
    if gpt not in _stable_rows:
        _stable_rows[gpt] = _test_rows(gpt) if gpt.dtype == torch.float32 else {STANDARD_ROWS}
    sizes = tuple(size for size in TESTED_ROWS if {size, size * passes} <= _stable_rows[gpt])
    return sizes if sizes and sizes[-1] >= STANDARD_ROWS else (STANDARD_ROWS,)


_stable_rows: WeakKeyDictionary[GPT, set[int]] = WeakKeyDictionary()


@torch.inference_mode()
def _test_rows(gpt: GPT) -> set[int]:
    """The numbers of TESTED_ROWS with which products give the same bits as with STANDARD_ROWS."""
    block, stable = gpt.blocks[0], set(TESTED_ROWS)
    around = gpt.around if gpt.neighbour_table is None else None
    linears = block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj, gpt.condition, around, gpt.head
    for linear in filter(None, linears):
        x = torch.randn(5 * STANDARD_ROWS, linear.in_features, generator=torch.Generator().manual_seed(0))
        expected = torch.cat([linear(rows) for rows in x.split(STANDARD_ROWS)])
        stable &= {
            rows
            for rows in TESTED_ROWS
            if torch.equal(linear(x[:rows]), expected[:rows]) and torch.equal(linear(x[-rows:]), expected[-rows:])
        }
    return stable


def pad_rows(rows: Tensor, count: int) -> Tensor:
    """At least `count` rows: the last one is repeated."""
    missing = count - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
