"""What both stages share: settings of the fit, learning rate schedule, AdamW and compilation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class FitConfig:
    """How long and how fast a stage trains."""

    steps: int = 10_000
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-3
    muon_rate: float = 0.0  # of Muon, for a transformer's matrices and a VQGAN's convolutions; 0: AdamW for all
    warmup: int = 200  # steps
    weight_decay: float = 0.01
    ema_decay: float = 0.999  # of the averaged weights, which are the result
    validate_every: int = 1000  # steps
    patience: int = 0  # validations without a lower loss that end the stage with the best weights; 0: keep the last
    precision: str = "auto"  # Lightning's; auto: bfloat16 where the hardware multiplies it, else float32
    compile: bool = False  # torch.compile the network: slower start, faster steps; needs a C++ compiler


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


def adamw(network: nn.Module, config: FitConfig, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions only, not on biases, norms and other vectors."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)
