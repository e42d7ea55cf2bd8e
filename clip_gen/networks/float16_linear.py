"""Linear layers with float16 weights and float32 products, on an x86 CPU: half the memory traffic of float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float16Linear(nn.Module):
    """A Linear with packed float16 weights, by FBGEMM (arXiv 2101.05615).

    Weights that fit float16 keep their bits. Larger ones are clamped to its range.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features = linear.in_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        largest = torch.finfo(torch.float16).max
        weight = linear.weight.detach().float().clamp(-largest, largest)  # packing would clamp in place
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Without this, torch looks up __torch_function__ on the packed weights and handles an exception in every call,
        # which doubles the time of a small product.
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
