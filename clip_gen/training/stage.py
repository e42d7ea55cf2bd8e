"""What both stages share: settings of the fit, learning rate schedule, compilation, and the optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import pytorch_lightning as pl
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from clip_gen.hardware import prefers_bfloat16


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a stage trains."""

    steps: int = 10_000
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-3
    muon_rate: float = 0.0  # of Muon, for matrices and convolutions; 0: AdamW for all
    warmup: int = 200  # steps
    weight_decay: float = 0.01
    ema_decay: float = 0.999  # of the averaged weights, which are the result
    validate_every: int = 1000  # steps
    patience: int = 0  # validations without a lower loss that end the stage with the best weights; 0: keep the last
    precision: str = "auto"  # Lightning's; auto: bfloat16 where the hardware multiplies it, else float32
    compile: bool = False  # torch.compile the network: slower start, faster steps; needs a C++ compiler
    gradient_checkpointing: bool = False  # less memory, slower steps


class Stage(pl.LightningModule):
    """A network in training. frozen: networks that the loss uses; they are not trained, averaged or saved.

    `time_spent` is the fraction of the stage's minutes that had passed when the batch began, in [0, 1] and the same in
    every process; 0 without a time limit.
    """

    def __init__(self, config: FitConfig, frozen: Sequence[nn.Module] = ()):
        super().__init__()
        self.config = config
        self.frozen = list(frozen)  # a list, so they are no submodules
        self.time_spent = 0.0

    def setup(self, stage: str) -> None:
        """Compiles for this process's number of threads; torch's cache would reuse code for another number."""
        torch._inductor.config.cpp.threads = torch.get_num_threads()

    def on_fit_start(self) -> None:
        for network in self.frozen:
            network.to(self.device)

    @property
    def fraction_done(self) -> float:
        """The fraction of the stage that is over, by steps or by time, whichever is more."""
        return max(self.global_step / self.config.steps, self.time_spent)

    def learning(self, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """The result of configure_optimizers. The rate rises for `warmup` steps, or a twentieth of the time limit, and
        then falls along a cosine to a hundredth.
        """
        config = self.config

        def factor(step: int) -> float:
            # At least 5 steps by time: a slow first step, as with compilation, must not end the warm-up alone.
            warm = max((step + 1) / max(1, config.warmup), min(20 * self.time_spent, (step + 1) / 5))
            if warm < 1:
                return warm
            done = max((step - config.warmup) / max(1, config.steps - config.warmup), self.time_spent)
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def process_count() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def compiled(network: nn.Module, dynamic: bool | None = None) -> None:
    """torch.compile in place. Where it fails, as without Python's headers, torch warns and runs uncompiled."""
    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.donated_buffer = False  # the adaptive weight goes through a graph backwards twice
    torch._inductor.config.fallback_random = True  # inductor's own dropout is slow on a CPU
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    network.compile(dynamic=dynamic)


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing in place: of each block only the inputs are kept, and the backward pass computes the rest
    again, with the same dropout, so the gradients stay the same. arXiv 1604.06174.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def adamw(network: nn.Module, config: FitConfig, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions only, not on biases, norms and other vectors."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)


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
