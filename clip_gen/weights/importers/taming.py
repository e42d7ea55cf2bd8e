"""VQGANs of taming-transformers and latent-diffusion: a Lightning checkpoint and its YAML file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clip_gen.config import GPTConfig, ModelConfig, VQGANConfig, config_of, read_settings
from clip_gen.networks.vqgan import VQGAN
from clip_gen.weights.importers.state_dict import Checkpoint, Source, convert_discriminator
from clip_gen.weights.model_folder import on_meta

# Their class: our quantiser. The second and third class are the first without its discriminator.
QUANTIZERS = {"VQModel": "taming", "VQNoDiscModel": "taming", "VQModelInterface": "taming", "GumbelVQ": "gumbel"}
SIZES = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")
# Other settings and their only supported value, which is also the default, except for double_z.
FIXED = {
    **{"double_z": False, "in_channels": 3, "out_ch": 3, "attn_type": "vanilla", "use_linear_attn": False},
    **{"resamp_with_conv": True, "tanh_out": False, "give_pre_end": False, "remap": None},
}
# Losses in the checkpoint. LPIPS is not trained, so it is not imported.
DISCRIMINATOR, PERCEPTUAL = "loss.discriminator.", "loss.perceptual_loss."
FIRST_STAGE = "first_stage_model."  # prefix of the VQGAN in a Net2NetTransformer or LatentDiffusion
REMEDY = "give the YAML file that came with the checkpoint"


def read_taming_config(path: Path, name: str) -> ModelConfig:
    """The config of a model folder with the VQGAN in taming's YAML file.

    ValueError unless the file describes a supported VQGAN of RGB pictures.
    """
    try:
        vqgan = _vqgan_config(path)
        gpt = GPTConfig(block_size=vqgan.grid**2, codebook_size=vqgan.codebook_size)
        config = ModelConfig(name, vqgan=vqgan, gpt=gpt)
        config.check()
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}; {REMEDY}") from error
    return config


def _vqgan_config(path: Path) -> VQGANConfig:
    settings = read_settings(path)
    try:
        model = settings["model"]
        model = model["params"].get("first_stage_config", model)
        params, kind = model["params"], str(model["target"]).rpartition(".")[2]
        encoder = {"double_z": True, "remap": params.get("remap")} | params["ddconfig"]
        values = {name: encoder[name] for name in SIZES}
        values |= {"codebook_size": params["n_embed"], "codebook_dim": params["embed_dim"]}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            "has not all settings of a VQGAN of taming-transformers: model.target, and in model.params n_embed, "
            f"embed_dim and ddconfig with {', '.join(SIZES)}"
        ) from error
    if kind not in QUANTIZERS:
        raise ValueError(f"its model is {kind}; only {', '.join(QUANTIZERS)} can be imported")
    for name, wanted in FIXED.items():
        if encoder.get(name, wanted) != wanted:
            raise ValueError(f"{name} is {encoder[name]}; only VQGANs whose {name} is {wanted} can be imported")
    return config_of(VQGANConfig, values | {"quantizer": QUANTIZERS[kind]}, path)


def convert_vqgan(
    checkpoint: Checkpoint, config: VQGANConfig, settings: Path, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of our VQGAN and of its discriminator. settings: the YAML file, for messages."""
    network = on_meta(lambda: VQGAN(config), settings, REMEDY)
    # Our codebook is one module deeper than theirs.
    sources = {name: Source(name.replace("quantizer.quantize.", "quantize.")) for name in network.state_dict()}
    tensors = checkpoint.without(DISCRIMINATOR, PERCEPTUAL).converted(network, sources, dtype)
    return tensors, convert_discriminator(checkpoint.under(DISCRIMINATOR))
