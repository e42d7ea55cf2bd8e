"""What every training here shares: AdamW or Muon with decay on matrices only, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    network: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Biases, norms and single vectors are not decayed: they have no size to keep small."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of a network's blocks, AdamW for everything else, as the one optimiser Lightning wants.

    Muon steps along the nearest orthogonal matrix, so that no direction is left behind: Jordan et al. 2024,
    kellerjordan.github.io/posts/muon; scaled so that AdamW's rates hold: arXiv 2502.16982. Both are torch's own.
    """

    def __init__(self, blocks: nn.Module, network: nn.Module, muon_rate: float, learning_rate: float, decay: float):
        matrices = [parameter for parameter in blocks.parameters() if parameter.dim() == 2]
        apart = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in network.parameters() if id(parameter) not in apart]
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.parts = (
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self._share()

    def _share(self) -> None:
        """The parts work on this optimiser's own groups and state, so that it is saved and loaded as any other is."""
        for i, part in enumerate(self.parts):
            self.param_groups[i] = part.param_groups[0] | self.param_groups[i]
            part.param_groups, part.state = [self.param_groups[i]], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """From 0 up in `warmup` steps, then down along a cosine to a hundredth at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
