"""Small foreign checkpoints for the tests of the importers."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from conftest import TINY
from torch import Tensor, nn

from clip_gen.config import ClipConfig
from clip_gen.networks.clip_encoder import build_clip
from clip_gen.networks.discriminator import build_discriminator
from clip_gen.networks.vqgan import VQGAN
from clip_gen.weights.importers.taming import read_taming_config

HFAILAB = Path(__file__).parent / "fixtures" / "hfailab"

VIT = ClipConfig(24, 32, (2,), 64, 8, 77, 49408, 64, 1, 1)
CODES = 48  # of taming's VQGANs here
RESNET = replace(VIT, vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None)
assert TINY.gpt.embed_dim != VIT.embed_dim


def published_keys() -> dict[str, dict[str, list[int]]]:
    """Shapes by key of HFAiLab's two published files."""
    return json.loads((HFAILAB / "published_keys.json").read_text())


def hfailab_files(folder: Path, gpt: dict[str, Tensor] | None = None, vqgan: dict[str, Tensor] | None = None) -> Path:
    """Writes gpt.pt and vqgan.pt in HFAiLab's format, with these tensors replaced (None: removed)."""
    for part, changed in (("gpt", gpt or {}), ("vqgan", vqgan or {})):
        content = hfailab_checkpoint(part)
        content["model"] |= changed
        content["model"] = {name: tensor for name, tensor in content["model"].items() if tensor is not None}
        torch.save(content, folder / f"{part}.pt")
    return folder


def hfailab_checkpoint(part: str) -> dict[str, object]:
    content = torch.load(HFAILAB / f"{part}_tiny.pt", weights_only=True)
    if part == "vqgan":
        torch.manual_seed(0)
        shapes = {name: shape for name, shape in published_keys()["vqgan"].items() if name.startswith("discriminator.")}
        content["model"] |= {name: torch.rand(shape) for name, shape in shapes.items()}
    return content


def clip_state(config: ClipConfig, seed: int = 0) -> dict[str, Tensor]:
    """A random CLIP of these sizes. OpenAI initialises a ResNet's last norms with zeros, which would hide errors."""
    torch.manual_seed(seed)
    state = build_clip(config).state_dict()
    for name, tensor in state.items():
        if name.endswith("bn3.weight"):
            tensor.fill_(0.5)
    return state


class Archive(nn.Module):
    """The layout of an official file: the network's tensors and three sizes as tensors."""

    def __init__(self, state: dict[str, Tensor], resolution: int):
        super().__init__()
        sizes = {"input_resolution": resolution, "context_length": 77, "vocab_size": 49408}
        for name, tensor in (state | {name: torch.tensor(size) for name, size in sizes.items()}).items():
            *path, last = name.split(".")
            module = self
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.register_buffer(last, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


def write_archive(state: dict[str, Tensor], path: Path) -> None:
    """TorchScript with the layout of OpenAI's files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Archive(state, 32)).save(str(path))


def taming_settings(gumbel: bool, ch_mult: list[int], attention: list[int]) -> dict[str, object]:
    """A configuration with the layout of taming's."""
    sizes = {"double_z": False, "z_channels": 32, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
    sizes |= {"ch_mult": ch_mult, "num_res_blocks": 1, "attn_resolutions": attention, "dropout": 0.0}
    loss = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"disc_start": 0}}
    params = {"embed_dim": 32, "n_embed": CODES, "monitor": "val/rec_loss", "ddconfig": sizes, "lossconfig": loss}
    target = f"taming.models.vqgan.{'GumbelVQ' if gumbel else 'VQModel'}"
    return {"model": {"base_learning_rate": 4.5e-6, "target": target, "params": params}}


KINDS = {
    "f4": (False, [1, 2, 2], [8]),
    "f16": (False, [1, 1, 2, 2, 4], [2]),
    "gumbel f8": (True, [1, 1, 2, 4], [4]),
}


def taming_files(folder: Path, kind: str = "f16") -> dict[str, bytes]:
    """A random VQGAN as taming publishes it: model.yaml, and the Lightning checkpoint last.ckpt with its losses."""
    (folder / "model.yaml").write_text(yaml.safe_dump(taming_settings(*KINDS[kind])))
    torch.manual_seed(0)
    vqgan = VQGAN(read_taming_config(folder / "model.yaml", "published").vqgan).state_dict()
    state = {name.replace("quantizer.quantize.", "quantize."): tensor for name, tensor in vqgan.items()}
    state |= {f"loss.discriminator.{name}": tensor for name, tensor in build_discriminator().state_dict().items()}
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.rand(1, 64, 1, 1)
    torch.save({"epoch": 3, "global_step": 1000, "state_dict": state, "callbacks": {}}, folder / "last.ckpt")
    return {name: (folder / name).read_bytes() for name in ("model.yaml", "last.ckpt")}
