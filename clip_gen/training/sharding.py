"""FSDP for the transformer: every process keeps a share of its weights, and of their gradients, means and moments.

PyTorch's FSDP2, after arXiv 2304.11277: a layer's weights are brought together when they are needed and let go of at
once. Lightning's own strategy for it wants a GPU and writes checkpoints as folders; this one is its DDP with other
weights, so that checkpoints are those of any other training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from clip_gen.networks.gpt import GPT

log = logging.getLogger(__name__)


class Sharding(DDPStrategy):
    """Trains a stage's `gpt` in shares; `whole` is the network itself, on the CPU, with whatever was last put there."""

    def model_to_device(self) -> None:
        stage = self.lightning_module
        # In memory that no GPU need have for all of it; not compiled, which a copy is not.
        self.whole, stage.gpt = stage.gpt, deepcopy(stage.gpt)
        self.share_out(stage.gpt)
        super().model_to_device()
        if self.is_global_zero:
            held = sum(parameter.to_local().numel() for parameter in stage.gpt.parameters())
            total = sum(parameter.numel() for parameter in stage.gpt.parameters())
            log.info("fsdp: %.0f %% of the transformer's weights are in this process", 100 * held / total)

    def configure_ddp(self) -> None:
        """Nothing is left to do: FSDP adds up the gradients."""

    def share_out(self, gpt: GPT) -> None:
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        # Autocast would keep its copy of every weight from the way there to the way back.
        low = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
        for block in gpt.blocks:
            for part in (block.attn, block.mlp):
                fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(gpt, mesh=mesh, reshard_after_forward=True)

    @contextmanager
    def together(self, stage: pl.LightningModule) -> Iterator[None]:
        """The stage with its whole network, as all processes know it by now, on its device in the first of them, where
        alone it may be used. Every process has to take part.
        """
        shares = stage.gpt
        self.put_together(stage)
        try:
            if self.is_global_zero:
                stage.gpt.to(stage.device)
            yield
        finally:
            self.whole.cpu()
            stage.gpt = shares

    def put_together(self, stage: pl.LightningModule) -> None:
        """Leaves the whole network in the stage, in every process."""
        self.whole.load_state_dict(in_one(stage.gpt.state_dict(), everywhere=True))
        stage.gpt = self.whole

    def on_train_end(self) -> None:
        # Here, where the shares are still where the processes can send them from.
        self.put_together(self.lightning_module)

    def lightning_module_state_dict(self) -> dict[str, object]:
        return in_one(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        return in_one(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        """Of each tensor nothing but the share gets to the device."""
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {}
            for number, values in saved["state"].items():
                like = parameters[number]
                shares[number] = {k: share_of(v, like) if v.shape == like.shape else v for k, v in values.items()}
            states.append(saved | {"state": shares})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def in_one(values: object, everywhere: bool = False) -> object:
    """The same dictionaries and lists, and every tensor that is in shares as a whole one on the CPU, in the first
    process or in all; in others as an empty one. Every process has to take part.
    """

    def gathered(value: object) -> object:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if everywhere or not torch.distributed.get_rank() else torch.empty(0)

    return tree_map(gathered, values)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, from all processes' shares where it is in shares. Every process has to take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, where `like` is in shares."""
    if not isinstance(like, DTensor):
        return value
    # Every process has all of the value already: nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
