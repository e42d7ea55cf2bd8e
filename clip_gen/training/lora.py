"""LoRA, arXiv 2106.09685: trains a transformer on few pictures through small additions to its matrices.

The additions are merged into the matrices after the training, so the model folder is as any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.training.sketch_trainer import Sketching


class LoRALinear(nn.Linear):
    """A linear layer with a trainable addition of low rank, which is zero at first.

    Weight and bias keep their names, so its state_dict is that of nn.Linear with two more tensors.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight + self.up @ self.down), self.bias
        return linear


def choose_parameters(gpt: GPT, rank: int, knows_tokens: bool) -> None:
    """Sets which parameters of a transformer stage 2 trains.

    rank: of LoRA's additions to the blocks and the head, beside which only the null condition is trained; 0: no LoRA.
    A sketch that knows the tokens is never trained, nor is the condition that it reads: the recipe trained the blocks
    beside it like this. If the tokens are new, it is trained, except for its head, which drawing does not use.
    """
    gpt.requires_grad_(not rank)
    if rank:
        for parent in (*(part for block in gpt.blocks for part in (block.attn, block.mlp)), gpt):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear) and (parent is not gpt or name == "head"):
                    setattr(parent, name, LoRALinear(layer, rank))
        if gpt.null_condition is not None and gpt.sketch is None:
            gpt.null_condition.requires_grad_(True)
    elif gpt.sketch is not None:
        (Sketching(gpt) if knows_tokens else gpt.sketch.head).requires_grad_(False)


def merge_lora(gpt: GPT) -> None:
    """Replaces LoRA's layers, if there are any, by plain ones that compute the same."""
    for parent in list(gpt.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(parent, name, layer.merged())
