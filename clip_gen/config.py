"""The settings of a model, as frozen dataclasses that are read from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Config = TypeVar("Config")

MAX_SIZE = 2**18  # of all sizes without a limit below; the largest known codebook has as many codes
MAX_LAYERS = 256
MAX_RES_BLOCKS = 32  # per resolution of a VQGAN; published ones have 2 or 3
MAX_RESOLUTION = 2048  # small weights may describe large pictures: one with 2**18 pixels a side needs 800 GB
ACTIVATIONS = ("quick_gelu", "gelu")  # of CLIP's transformers: OpenAI's approximation of GELU, and GELU
MAX_NESTED = 20  # levels of lists and mappings in a YAML file
RENAMED_FIELDS = {"looks_around": "neighbour_context"}  # in config files of earlier versions
CLIP_TOKENS = 49408  # vocabulary of CLIP's tokenizer, which all models here use


@dataclass(frozen=True)
class ClipConfig:
    """The sizes of OpenAI's CLIP class, and the activation. vision_layers: four numbers for a ResNet, one for a ViT."""

    embed_dim: int = 512
    image_resolution: int = 224
    vision_layers: tuple[int, ...] = (12,)
    vision_width: int = 768
    vision_patch_size: int | None = 32  # None for a ResNet
    context_length: int = 77
    vocab_size: int = 49408
    transformer_width: int = 512
    transformer_heads: int = 8
    transformer_layers: int = 12
    activation: str = "quick_gelu"  # or "gelu", as in most models of open_clip


@dataclass(frozen=True)
class VQGANConfig:
    """taming's Encoder and Decoder between images of `resolution` and a grid of h · w = T tokens.

    patch: side of the pixel squares that are folded into channels before the first convolution (1: none). So the side
    of the grid is resolution / patch / 2 ** (len(ch_mult) - 1). local: the encoder sees each square alone, so that a
    token depends on its own square only. The decoder sees all tokens.
    """

    resolution: int = 256
    patch: int = 1
    local: bool = False
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    z_channels: int = 256
    dropout: float = 0.0
    norm_eps: float = 1e-6  # of all group norms: taming's; HFAiLab's model has torch's 1e-5
    quantizer: str = "cosine"  # "cosine": l2-normalised codes with restart; "taming": VectorQuantizer2; "gumbel"
    codebook_size: int = 1024
    codebook_dim: int = 8

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.resolution // self.patch // 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 256  # T: the condition takes position 0, so the last token is never an input
    codebook_size: int = 1024
    embed_dim: int = 512  # of the CLIP embedding
    head_bias: bool = False  # HFAiLab's published transformer has one
    null_condition: bool = True  # learned; guidance needs it
    rotary: bool = False  # rotary embedding of row and column, besides learned positions
    neighbour_context: bool = False  # a position's input: the tokens above and beside it and the condition
    dropout: float = 0.1


@dataclass(frozen=True)
class BridgeConfig:
    """How text embeddings are shifted towards image embeddings (networks/bridge.py)."""

    mean_shift: float = 0.0  # share of the gap between the mean text and image embeddings; 1: all of it


@dataclass(frozen=True)
class ModelConfig:
    """The config.yaml of a model folder: all that is needed to build its networks."""

    name: str = "clip-gen"
    clip: ClipConfig = field(default_factory=ClipConfig)
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    gpt: GPTConfig = field(default_factory=GPTConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)

    def check(self) -> None:
        """ValueError if a size is out of range or the parts do not fit together."""
        vqgan, gpt, clip = self.vqgan, self.gpt, self.clip
        for part in ("clip", "vqgan", "gpt"):
            for name, value in vars(getattr(self, part)).items():
                most = MAX_RES_BLOCKS if name == "num_res_blocks" else MAX_LAYERS if "layer" in name else MAX_SIZE
                for size in value if isinstance(value, tuple) else [value]:
                    if isinstance(size, int) and not isinstance(size, bool) and not 1 <= size <= most:
                        raise ValueError(f"{part}.{name} is {size}; give 1 to {most}")
        pairs = {
            "gpt.block_size and the VQGAN's tokens per picture": (gpt.block_size, vqgan.grid**2),
            "gpt.codebook_size and vqgan.codebook_size": (gpt.codebook_size, vqgan.codebook_size),
            "gpt.embed_dim and clip.embed_dim": (gpt.embed_dim, clip.embed_dim),
        }
        for names, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise ValueError(f"{names} must be equal, but they are {ours} and {theirs}")
        if vqgan.resolution > MAX_RESOLUTION:
            raise ValueError(f"vqgan.resolution is {vqgan.resolution}; give {MAX_RESOLUTION} or less")
        if clip.vocab_size < CLIP_TOKENS:
            raise ValueError(f"clip.vocab_size is {clip.vocab_size}; CLIP's tokenizer has {CLIP_TOKENS}")
        if clip.activation not in ACTIVATIONS:
            raise ValueError(f'clip.activation is "{clip.activation}"; give {" or ".join(ACTIVATIONS)}')
        if clip.context_length < 3:
            raise ValueError(f"clip.context_length is {clip.context_length}; a word between two marks takes 3")
        least = clip.vision_patch_size or 32
        if clip.image_resolution < least:
            raise ValueError(f"clip.image_resolution is {clip.image_resolution}; this CLIP sees nothing below {least}")
        if not 0 < vqgan.norm_eps < 1:
            raise ValueError(f"vqgan.norm_eps is {vqgan.norm_eps}; give a small share of one, such as 1.0e-06")
        if gpt.n_embd % gpt.n_head:
            raise ValueError(f"gpt.n_embd ({gpt.n_embd}) must be a multiple of gpt.n_head ({gpt.n_head})")
        if gpt.rotary and gpt.n_embd // gpt.n_head % 4:
            raise ValueError(f"gpt.rotary needs n_embd / n_head to be a multiple of 4, not {gpt.n_embd // gpt.n_head}")
        if vqgan.local and len(vqgan.ch_mult) > 1:
            raise ValueError(f"vqgan.local has nothing to halve: vqgan.ch_mult takes one number, not {vqgan.ch_mult}")
        # taming's group norm has 32 groups. A group with one value per square would always be normalised to 0.
        if vqgan.local and vqgan.ch * vqgan.ch_mult[0] < 64:
            raise ValueError(f"vqgan.local needs 64 channels or more; vqgan.ch is {vqgan.ch}")


def read_config(path: Path, kind: type[Config]) -> Config:
    """A YAML file over the defaults of a dataclass; ValueError for unknown names and wrong types."""
    try:
        check_nesting(path)
        # Model folders come from strangers, and OmegaConf would replace ${oc.env:SECRET}.
        if "${" in path.read_text(encoding="utf-8"):
            raise ValueError("has ${...} in it, which is not filled in here; write the value itself")
        given = _with_new_names(OmegaConf.to_container(OmegaConf.load(path)))
        merged = OmegaConf.merge(OmegaConf.structured(kind), given)
        values = OmegaConf.to_container(merged)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {reason}") from error
    return _build(kind, values)


def _with_new_names(values: object) -> object:
    """The values with the new names of renamed fields."""
    if isinstance(values, dict):
        return {RENAMED_FIELDS.get(name, name): _with_new_names(value) for name, value in values.items()}
    return values


def read_settings(path: Path) -> dict[str, object]:
    """A foreign YAML file as plain dicts and lists; ValueError unless it is a mapping."""
    remedy = "give the YAML file that came with the checkpoint"
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; {remedy}")
    try:
        check_nesting(path)
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not a YAML file of settings; {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no settings; {remedy}")
    return values


def check_nesting(path: Path) -> None:
    """ValueError for deep nesting, with which the recursive YAML parser would crash Python."""
    depth = 0
    for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTED:
            raise ValueError(f"has lists or mappings more than {MAX_NESTED} levels deep; give a file without them")


def write_config(config: object, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def _build(kind: type[Config], values: dict) -> Config:
    """The frozen dataclass. OmegaConf's objects are mutable and have lists instead of tuples."""
    arguments = {}
    for spec in fields(kind):
        value = values[spec.name]
        default = spec.default_factory() if callable(spec.default_factory) else spec.default
        if is_dataclass(default):
            value = _build(type(default), value)
        arguments[spec.name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)
