"""Matrices in float16 for a CPU that multiplies float32: half as much to read, and laid out once for its products."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float16Linear(nn.Module):
    """A Linear whose weights are float16 and whose products are float32's, by FBGEMM (arXiv 2101.05615).

    Weights that were read from a file of float16 are the same to the bit; beyond float16's range they are brought to
    its ends.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        most = torch.finfo(torch.float16).max
        weight = linear.weight.detach().float().clamp(-most, most)  # else it would be done in place
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Else torch looks for __torch_function__ on what is packed, which throws: a small product takes twice as long.
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
