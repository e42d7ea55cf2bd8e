"""VQGANs published with taming-transformers: a Lightning checkpoint and the YAML file beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clip_gen.config import VQGANConfig, read_settings
from clip_gen.importers.discriminator import convert_discriminator
from clip_gen.importers.foreign import Foreign, Source, planned
from clip_gen.vqgan import VQGAN

QUANTIZERS = {"VQModel": "taming", "GumbelVQ": "gumbel"}  # their class, the quantiser we give it
# Ours is one of these with the same name inside; the codebook sits one module deeper.
CODEBOOK = "quantizer.quantize."
SIZES = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")
# What the checkpoint holds of the training's losses. LPIPS is a published network of its own that nothing was added to.
DISCRIMINATOR, PERCEPTUAL = "loss.discriminator.", "loss.perceptual_loss."


def read_vqgan_config(path: Path) -> VQGANConfig:
    """The sizes in a YAML file of taming's; ValueError for a model that is not one of its VQGANs of RGB pictures."""
    settings = read_settings(path)
    try:
        model = settings["model"]
        params, kind = model["params"], str(model["target"]).rpartition(".")[2]
        sizes = {name: params["ddconfig"][name] for name in SIZES}
        codes = {"codebook_size": params["n_embed"], "codebook_dim": params["embed_dim"]}
        extras = {name: params["ddconfig"].get(name, 3) for name in ("in_channels", "out_ch")}
        doubled, remap = params["ddconfig"].get("double_z", True), params.get("remap")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: has no {error} of a VQGAN of taming's; give the file beside the checkpoint"
        ) from error
    if kind not in QUANTIZERS:
        raise ValueError(f"{path}: its model is {kind}; only {' and '.join(QUANTIZERS)} can be imported")
    if doubled or remap or extras != {"in_channels": 3, "out_ch": 3}:
        raise ValueError(
            f"{path}: double_z is {doubled}, remap {remap}, channels {tuple(extras.values())}; only VQGANs of RGB "
            "pictures with double_z false and no remap can be imported"
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in (sizes | codes).items()}
    return VQGANConfig(**values, quantizer=QUANTIZERS[kind])


def convert_vqgan(
    found: Foreign, config: VQGANConfig, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of our VQGAN, and of its discriminator."""
    network = planned(lambda: VQGAN(config), found.path)
    sources = {name: Source(name.replace(CODEBOOK, "quantize.")) for name in network.state_dict()}
    tensors = found.without(DISCRIMINATOR, PERCEPTUAL).converted(network, sources, dtype)
    return tensors, convert_discriminator(found.under(DISCRIMINATOR), "main.")
