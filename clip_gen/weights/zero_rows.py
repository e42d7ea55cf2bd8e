"""Weights files without rows of zeros: most words of a small CLIP were never trained, and have such an embedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ROWS = ".rows"  # after the name of a matrix: the numbers of the rows that the file has of it, ascending, int32


def without_zero_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of which more than half of the rows are zero lose these, and get the numbers of the others."""
    packed = dict(tensors)
    for name, tensor in tensors.items():
        rows = tensor.any(dim=1).nonzero()[:, 0] if tensor.dim() == 2 else None
        if rows is not None and 2 * len(rows) < len(tensor):
            packed |= {name: tensor[rows], name + ROWS: rows.int()}
    return packed


def with_zero_rows(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with the rows that it leaves out; only where they fit the wanted matrices."""
    whole = dict(tensors)
    for name, network_tensor in wanted.items():
        rows = tensors.get(name + ROWS)
        if rows is not None and name in tensors and _fits(rows, tensors[name], network_tensor):
            del whole[name + ROWS]
            whole[name] = tensors[name].new_zeros(network_tensor.shape).index_copy_(0, rows.long(), tensors[name])
    return whole


def _fits(rows: Tensor, tensor: Tensor, wanted: Tensor) -> bool:
    if (
        rows.dtype != torch.int32
        or rows.dim() != 1
        or wanted.dim() != 2
        or tensor.shape != (len(rows), wanted.shape[1])
    ):
        return False
    return not len(rows) or bool(rows[0] >= 0 and rows[-1] < len(wanted) and (rows.diff() > 0).all())
