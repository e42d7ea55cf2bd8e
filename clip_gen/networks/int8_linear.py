"""Matrices in eight bits: half of what bfloat16 makes a CPU read for every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A Linear whose rows of weights are whole numbers up to 127 times a step of each row's own. Multiplies in
    bfloat16, and gives what its bias is kept in.

    Rows of x do not touch each other: what comes of one has the same bits however many stand beside it. Reading the
    matrix is all that one or two rows take; from a dozen rows on bfloat16 is faster. ValueError for a width that torch
    cannot take: it does not look, and reads what is not there.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.in_features = linear.in_features
        if linear.in_features % 16:
            width = linear.in_features
            raise ValueError(f'dtype int8 takes multiples of 16 as widths, and one here is {width}; give "auto"')
        weight = linear.weight.detach().float()
        steps = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        whole = (weight / steps.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", whole.to(torch.int8))
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        y = torch._weight_int8pack_mm(rows, self.weight, self.steps).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias
