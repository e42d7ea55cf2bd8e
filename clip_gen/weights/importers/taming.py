"""VQGANs of taming-transformers and latent-diffusion: a Lightning checkpoint and its YAML file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clip_gen.config import MAX_LAYERS, MAX_SIZE, VQGANConfig, read_settings
from clip_gen.networks.vqgan import VQGAN
from clip_gen.weights.importers.state_dict import Checkpoint, Source, convert_discriminator, on_meta

# Their class: our quantiser. The second and third class are the first without its discriminator.
QUANTIZERS = {"VQModel": "taming", "VQNoDiscModel": "taming", "VQModelInterface": "taming", "GumbelVQ": "gumbel"}
# Our codebook is one module deeper than theirs.
CODEBOOK = "quantizer.quantize."
SIZE_FIELDS = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")
LISTS = ("ch_mult", "attn_resolutions")
# Other settings of the encoder and the decoder: the default, and the only supported value.
FIXED = {
    "double_z": (True, False),
    **{"in_channels": (3, 3), "out_ch": (3, 3), "attn_type": ("vanilla", "vanilla"), "use_linear_attn": (False, False)},
    **{"resamp_with_conv": (True, True), "tanh_out": (False, False), "give_pre_end": (False, False)},
}
# Losses in the checkpoint. LPIPS is not trained, so it is not imported.
DISCRIMINATOR, PERCEPTUAL = "loss.discriminator.", "loss.perceptual_loss."
FIRST_STAGE = "first_stage_model."  # prefix of the VQGAN in a Net2NetTransformer or LatentDiffusion
REMEDY = "give the YAML file that came with the checkpoint"


def read_vqgan_config(path: Path) -> VQGANConfig:
    """The sizes in taming's YAML file; ValueError unless it describes a supported VQGAN of RGB pictures."""
    settings = read_settings(path)
    model = _mapping(path, settings, "model")
    if "first_stage_config" in _mapping(path, settings, "model.params"):
        model = _mapping(path, settings, "model.params.first_stage_config")
    kind = str(model.get("target")).rpartition(".")[2]
    if kind not in QUANTIZERS:
        raise ValueError(f"{path}: its model is {kind}; only {', '.join(QUANTIZERS)} can be imported")
    params = _mapping(path, model, "params")
    encoder = _mapping(path, params, "ddconfig")
    values = {name: _sizes(path, encoder, name) for name in SIZE_FIELDS}
    values |= {"codebook_size": _sizes(path, params, "n_embed"), "codebook_dim": _sizes(path, params, "embed_dim")}
    stated = {name: (encoder.get(name, unsaid), wanted) for name, (unsaid, wanted) in FIXED.items()}
    for name, (value, wanted) in (stated | {"remap": (params.get("remap"), None)}).items():
        if value != wanted:
            raise ValueError(f"{path}: {name} is {value}; only VQGANs whose {name} is {wanted} can be imported")
    config = VQGANConfig(**values, quantizer=QUANTIZERS[kind])
    on_meta(lambda: VQGAN(config), path, REMEDY)
    return config


def _mapping(path: Path, settings: dict[str, object], names: str) -> dict[str, object]:
    """The settings under dotted names."""
    for name in names.split("."):
        settings = settings.get(name)
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: has no settings under {names}, as a VQGAN of taming-transformers has; {REMEDY}")
    return settings


def _sizes(path: Path, settings: dict[str, object], name: str) -> int | tuple[int, ...]:
    """A size, or a tuple of sizes for the names in LISTS."""
    if name not in settings:
        raise ValueError(f"{path}: has no {name}, as a VQGAN of taming-transformers has; {REMEDY}")
    value, several = settings[name], name in LISTS
    sizes = value if isinstance(value, list) else [value]
    most = MAX_LAYERS if name == "num_res_blocks" else MAX_SIZE
    whole = all(type(size) is int and 1 <= size <= most for size in sizes)
    if isinstance(value, list) != several or not whole or (name == "ch_mult" and not sizes):
        wanted = f"{'a list of whole numbers' if several else 'a whole number'} from 1 to {most}"
        raise ValueError(f"{path}: {name} is {str(value)[:60]}, but must be {wanted}; {REMEDY}")
    return tuple(sizes) if several else value


def convert_vqgan(
    checkpoint: Checkpoint, config: VQGANConfig, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of our VQGAN and of its discriminator."""
    network = on_meta(lambda: VQGAN(config), checkpoint.path)
    sources = {name: Source(name.replace(CODEBOOK, "quantize.")) for name in network.state_dict()}
    tensors = checkpoint.without(DISCRIMINATOR, PERCEPTUAL).converted(network, sources, dtype)
    return tensors, convert_discriminator(checkpoint.under(DISCRIMINATOR), "main.")
