"""What every stage is told and how it learns: AdamW or Muon with decay on matrices only, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from clip_gen.hardware import prefers_bfloat16


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a stage learns."""

    steps: int = 10_000
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-3
    muon_rate: float = 0.0  # of Muon for a transformer's matrices and a VQGAN's convolutions; 0: AdamW for all
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999  # of the averaged weights that are kept in the end
    validate_every: int = 1000  # steps
    patience: int = 0  # so many validations without a better one end the stage, and the best is kept; 0: the last is
    precision: str = "auto"  # as Lightning's; auto: bfloat16 where the hardware has it, else float32
    compile: bool = False  # torch.compile the network: a minute at the start, then faster; needs a C++ compiler


class Stage(pl.LightningModule):
    """A network in training.

    `time_spent` is the share of the time there is that had passed when the batch began, the same in every process; 0
    when there is no end.
    """

    def __init__(self, config: FitConfig):
        super().__init__()
        self.config = config
        self.time_spent = 0.0

    def setup(self, stage: str) -> None:
        """Compiled code is for as many threads as there are here, now that processes have shared them out.

        torch's cache would hand on code made for another number.
        """
        torch._inductor.config.cpp.threads = torch.get_num_threads()

    def log_means(self, values: dict[str, Tensor], count: int) -> None:
        """What a step found on `count` samples, each value the mean over all processes, which wait for one another
        once.
        """
        means = torch.stack([value.detach().float() for value in values.values()])
        if processes() > 1:
            torch.distributed.all_reduce(means)
            means = means / processes()
        self.log_dict(dict(zip(values, means, strict=True)), batch_size=count)

    def learning(self, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """What configure_optimizers returns: the rate goes up in `warmup` steps, or in a twentieth of the time there
        is, then along a cosine to a hundredth.
        """
        config = self.config

        def factor(step: int) -> float:
            # A first step that takes long, as the one that is compiled for, is not to end the warm-up by itself.
            up = max((step + 1) / max(1, config.warmup), min(20 * self.time_spent, (step + 1) / 5))
            if up < 1:
                return up
            done = max((step - config.warmup) / max(1, config.steps - config.warmup), self.time_spent)
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def processes() -> int:
    """How many train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def compiled(network: nn.Module, dynamic: bool | None = None) -> None:
    """torch.compile in place; where that fails, as without the headers of Python, torch says so and does without."""
    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.donated_buffer = False  # the adaptive weight goes back through a graph more than once
    torch._inductor.config.fallback_random = True  # its own dropout is slow on a CPU
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    network.compile(dynamic=dynamic)


def adamw(network: nn.Module, config: FitConfig, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Biases, norms and single vectors are not decayed: they have no size to keep small."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)


class Muon(torch.optim.Optimizer):
    """Muon for some matrices, AdamW for everything else, as the one optimiser Lightning wants. A convolution's weights
    (out, in, h, w) are a matrix of `out` rows.

    Muon steps along the nearest orthogonal matrix, so that no direction is left behind: Jordan et al. 2024,
    kellerjordan.github.io/posts/muon; scaled so that AdamW's rates hold: arXiv 2502.16982. torch's own always looks for
    it in bfloat16, which a CPU that does not multiply that takes several times as long for as for all the rest of a
    step.
    """

    def __init__(self, network: nn.Module, matrices: list[nn.Parameter], config: FitConfig):
        apart = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in network.parameters() if id(parameter) not in apart]
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.param_groups[0] |= {"lr": config.muon_rate, "weight_decay": config.weight_decay, "momentum": 0.95}
        self._share()

    def _share(self) -> None:
        """AdamW works on this optimiser's own group and state, so that it is saved and loaded as any other is."""
        self.param_groups[1] = self.adamw.param_groups[0] | self.param_groups[1]
        self.adamw.param_groups, self.adamw.state = [self.param_groups[1]], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._step_matrices(**self.param_groups[0])
        self.adamw.step()
        return loss

    @torch.no_grad()
    def _step_matrices(
        self, params: list[Tensor], lr: float, weight_decay: float, momentum: float, **_: object
    ) -> None:
        alike: dict[tuple[int, ...], list[Tensor]] = {}  # those of one shape at a time
        for matrix in params:
            if matrix.grad is not None:
                alike.setdefault((matrix.shape[0], matrix.shape[1:].numel()), []).append(matrix)
        for shape, matrices in alike.items():
            directions = []
            for matrix in matrices:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                directions.append(matrix.grad.lerp(average, momentum).flatten(1))  # as Nesterov looks ahead
            rate = 0.2 * max(shape) ** 0.5 * lr
            for matrix, direction in zip(matrices, orthogonal(torch.stack(directions)), strict=True):
                matrix.mul_(1 - lr * weight_decay).sub_(direction.view(matrix.shape), alpha=rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns) with all singular values brought to about 1, within a third or so, by Newton and Schulz's
    iteration with the post's coefficients, which trade exactness for speed.
    """
    x = matrices.bfloat16() if prefers_bfloat16(matrices.device, training=True) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    rows, columns = x.shape[1:]
    if x.dtype == torch.bfloat16 or columns < 2 * rows:
        for _ in range(5):
            squares = x @ x.mT
            x = 3.4445 * x + (-4.7750 * squares + 2.0315 * squares @ squares) @ x
    else:
        # A round makes p x of x and p s p of its squares s: the squares are enough to go on with, and small.
        squares, one = x @ x.mT, torch.eye(rows, device=x.device)
        product = one
        for _ in range(5):
            p = 3.4445 * one - 4.7750 * squares + 2.0315 * squares @ squares
            product, squares = p @ product, p @ squares @ p
        x = product @ x
    return (x.mT if tall else x).to(matrices.dtype)
