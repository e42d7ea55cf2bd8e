"""Positions on the grid of tokens: their neighbours, and their rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_rotation(side: int, head_size: int) -> Tensor:
    """Cosines and signed sines (2, T, D) of rotary embeddings on a grid of T = side² positions.

    Half of a head's channels rotate with the row, half with the column, so attention can depend on relative offsets.
    Rotary embedding: arXiv 2104.09864; by row and column, for images: arXiv 2403.13298.
    """
    frequencies = 100.0 ** (-torch.arange(head_size // 4) / (head_size // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, D / 4)
    rows, columns = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
    angles = torch.cat([rows, columns], dim=1)
    return torch.stack([angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)])


def neighbour_positions(side: int, row_delay: int = 0) -> Tensor:
    """The neighbours of every position of a grid, (T, 4): the previous one, and those above to the left, straight above
    and to the right. T stands for a neighbour outside the grid.

    With a row delay the first one of a row has no previous one, which is sampled later.
    """
    position = torch.arange(side * side)
    row, column = position // side, position % side
    neighbours = torch.stack([position - 1, position - side - 1, position - side, position - side + 1], dim=1)
    left, right = column < 1, column > side - 2
    first = left if row_delay else position < 1
    outside = torch.stack([first, (row < 1) | left, row < 1, (row < 1) | right], dim=1)
    return torch.where(outside, side * side, neighbours)


def diagonal_steps(side: int, row_delay: int) -> Tensor:
    """In which step each position of a grid is sampled, (T,), if a row is so many positions behind the one above.

    If row_delay is 2 or more, the neighbours of a position are all in earlier steps.
    """
    position = torch.arange(side * side)
    return position % side + row_delay * (position // side)


def rotate(x: Tensor, rotation: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Rotates channel pairs of x (..., n, D), half of D apart, by the cosines and signed sines (2, n, D)."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), sine)
