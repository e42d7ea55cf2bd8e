"""The Muon optimizer for matrices, with AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clip_gen.hardware import prefers_bfloat16
from clip_gen.training.stage import FitConfig


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, AdamW for everything else, as the single optimizer that Lightning wants. A convolution's
    weights (out, in, h, w) count as a matrix of `out` rows.

    Muon steps along the nearest orthogonal matrix, so all directions move alike: Jordan et al. 2024,
    kellerjordan.github.io/posts/muon; scaled so that AdamW's learning rates fit: arXiv 2502.16982. torch.optim.Muon
    takes no convolutions, and always uses bfloat16, which is several times slower on a CPU without such instructions.
    """

    def __init__(self, network: nn.Module, matrices: list[nn.Parameter], config: FitConfig):
        with_muon = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in network.parameters() if id(parameter) not in with_muon]
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.param_groups[0] |= {"lr": config.muon_rate, "weight_decay": config.weight_decay, "momentum": 0.95}
        self._share_with_adamw()

    def _share_with_adamw(self) -> None:
        """AdamW uses this optimizer's second group and its state, so both are saved and loaded as one optimizer."""
        self.param_groups[1] = self.adamw.param_groups[0] | self.param_groups[1]
        self.adamw.param_groups, self.adamw.state = [self.param_groups[1]], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share_with_adamw()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._step_matrices(**self.param_groups[0])
        self.adamw.step()
        return loss

    @torch.no_grad()
    def _step_matrices(
        self, params: list[Tensor], lr: float, weight_decay: float, momentum: float, **_: object
    ) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = {}  # matrices of one shape are stacked
        for matrix in params:
            if matrix.grad is not None:
                by_shape.setdefault((matrix.shape[0], matrix.shape[1:].numel()), []).append(matrix)
        for shape, matrices in by_shape.items():
            directions = []
            for matrix in matrices:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                directions.append(matrix.grad.lerp(average, momentum).flatten(1))  # Nesterov momentum
            rate = 0.2 * max(shape) ** 0.5 * lr
            for matrix, direction in zip(matrices, orthogonal(torch.stack(directions)), strict=True):
                matrix.mul_(1 - lr * weight_decay).sub_(direction.view(matrix.shape), alpha=rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns) with all singular values brought to 1, within about a third, by the Newton-Schulz iteration
    with the coefficients of the Muon post, which trade exactness for speed.
    """
    x = matrices.bfloat16() if prefers_bfloat16(matrices.device, training=True) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        squares = x @ x.mT
        x = 3.4445 * x + (-4.7750 * squares + 2.0315 * squares @ squares) @ x
    return (x.mT if tall else x).to(matrices.dtype)
