"""The settings of a model, as frozen dataclasses that are read from YAML."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")

ACTIVATIONS = ("quick_gelu", "gelu")  # of CLIP's transformers: OpenAI's approximation of GELU, and GELU
RENAMED_FIELDS = {"looks_around": "neighbour_context"}  # in config files of earlier versions
MAX_SIZE = 2**18  # of all sizes without other limits; the largest known codebook has as many codes
MAX_COMPLETIONS, MAX_PHRASES, MAX_PHRASE = 16, 64, 100  # items, items, characters
MAX_NESTED = 20  # levels of lists and mappings in a YAML file
LIMITS = {
    **dict.fromkeys(("n_layer", "vision_layers", "transformer_layers"), (1, 256)),
    "sketch_drawings": (0, 64),
    "sketch_cells": (1, 64),
    "memory": (0, MAX_SIZE),
    "row_delay": (0, 512),
    "num_res_blocks": (1, 32),  # per resolution; published VQGANs have 2 or 3
    "resolution": (1, 2048),  # small weights may describe large pictures: one with 2**18 pixels a side needs 800 GB
    "context_length": (3, MAX_SIZE),  # a word between two marks
    "vocab_size": (49408, MAX_SIZE),  # CLIP's tokenizer, which all models here use, has 49408
    "norm_eps": (1e-12, 1),
    "likelihood_weight": (0, 100),
}


def _freeze_lists(config: object) -> None:
    """Replaces the lists of a new frozen dataclass by tuples, so that it is hashable."""
    for name, value in vars(config).items():
        if isinstance(value, list):
            object.__setattr__(config, name, tuple(value))


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
    row_delay: int = 0  # sample all rows at once, each so many positions behind the one above; 0: one after the other
    sketch_drawings: int = 0  # in the sketch (networks/sketch.py); 0: no sketch
    sketch_cells: int = 12  # side of their squares, in tokens
    dropout: float = 0.1


@dataclass(frozen=True)
class Completion:
    """Phrases such as "on a red background", one of which is added to a prompt that leaves this unsaid.

    unless: words that show that the prompt says it. replaces: words that the phrase replaces, as "left of" does "and";
    then prompts without them are not completed. Each may be a few words in a row; articles do not count.
    """

    phrases: list[str] = field(default_factory=list)  # lists, because OmegaConf does not check the items of tuples
    unless: list[str] = field(default_factory=list)
    replaces: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _freeze_lists(self)


@dataclass(frozen=True)
class BridgeConfig:
    """How text embeddings become such as images have (networks/bridge.py), and what candidates are ranked by."""

    mean_shift: float = 0.0  # share of the gap between the mean text and image embeddings; 1: all of it
    memory: int = 0  # embeddings of pictures to remember (networks/memory.py); 0: no memory
    memory_axes: int = 40  # numbers to remember of each
    unsaid_axes: int = 2  # directions of what texts leave unsaid, such as one of three styles
    completions: list[Completion] = field(default_factory=list)  # see networks/mixing.py
    likelihood_weight: float = 0.0  # of the mean log-likelihood of a candidate's tokens, beside the CLIP score

    def __post_init__(self) -> None:
        _freeze_lists(self)


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
        for part in ("clip", "vqgan", "gpt", "bridge"):
            for name, value in vars(getattr(self, part)).items():
                least, most = LIMITS.get(name, (1, MAX_SIZE))
                for size in value if isinstance(value, tuple) else [value]:
                    if (type(size) is int or name in LIMITS) and not least <= size <= most:
                        raise ValueError(f"{part}.{name} is {size}; give {least} to {most}")
        _check_completions(self.bridge.completions)
        pairs = {
            "gpt.block_size and the VQGAN's tokens per picture": (gpt.block_size, vqgan.grid**2),
            "gpt.codebook_size and vqgan.codebook_size": (gpt.codebook_size, vqgan.codebook_size),
            "gpt.embed_dim and clip.embed_dim": (gpt.embed_dim, clip.embed_dim),
        }
        for names, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise ValueError(f"{names} must be equal, but they are {ours} and {theirs}")
        if clip.activation not in ACTIVATIONS:
            raise ValueError(f'clip.activation is "{clip.activation}"; give {" or ".join(ACTIVATIONS)}')
        least = clip.vision_patch_size or 32
        if clip.image_resolution < least:
            raise ValueError(f"clip.image_resolution is {clip.image_resolution}; this CLIP sees nothing below {least}")
        if gpt.n_embd % gpt.n_head:
            raise ValueError(f"gpt.n_embd ({gpt.n_embd}) must be a multiple of gpt.n_head ({gpt.n_head})")
        if gpt.row_delay and (gpt.row_delay == 1 or not gpt.neighbour_context):
            raise ValueError(
                f"gpt.row_delay is {gpt.row_delay}; give 0, or 2 or more with gpt.neighbour_context, since a token "
                "depends on the one above to the right"
            )
        if gpt.rotary and gpt.n_embd // gpt.n_head % 4:
            raise ValueError(f"gpt.rotary needs n_embd / n_head to be a multiple of 4, not {gpt.n_embd // gpt.n_head}")
        # taming's group norm has 32 groups. A group with one value per square would always be normalised to 0.
        if vqgan.local and (len(vqgan.ch_mult) != 1 or vqgan.ch * vqgan.ch_mult[0] < 64):
            raise ValueError(
                "vqgan.local needs one number in vqgan.ch_mult and 64 channels or more, "
                f"not ch_mult {vqgan.ch_mult} and ch {vqgan.ch}"
            )


def _check_completions(completions: Sequence[Completion]) -> None:
    """Model folders come from strangers, and every prediction uses the completions."""
    if len(completions) > MAX_COMPLETIONS:
        raise ValueError(f"bridge.completions has {len(completions)} items; give {MAX_COMPLETIONS} or fewer")
    for number, completion in enumerate(completions):
        for name, texts in vars(completion).items():
            field_name = f"bridge.completions[{number}].{name}"
            if not len(texts) <= MAX_PHRASES or (name == "phrases" and not texts):
                raise ValueError(f"{field_name} has {len(texts)} items; give 1 to {MAX_PHRASES}")
            for text in texts:
                if not isinstance(text, str) or not text.strip() or len(text) > MAX_PHRASE:
                    raise ValueError(f"{field_name} has {text!r:.60}; give words, up to {MAX_PHRASE} characters")


def read_config(path: Path, kind: type[Config]) -> Config:
    """A YAML file over the defaults of a dataclass; ValueError for unknown names and wrong types."""
    return config_of(kind, read_settings(path), path)


def read_settings(path: Path) -> dict[str, object]:
    """A YAML file as plain dicts and lists; ValueError unless it is a mapping."""
    try:
        _check_yaml(path.read_text(encoding="utf-8"))
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is not a YAML file of settings ({reason})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no settings")
    return values


def _check_yaml(text: str) -> None:
    """ValueError for what takes the YAML parser minutes or gigabytes in a small file."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases, *name, of which a few can describe more than fits into memory")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_NESTED:
            raise ValueError(f"it has lists or mappings more than {MAX_NESTED} levels deep")


def has_settings(path: Path, names: Collection[str]) -> bool:
    """Whether a YAML or JSON file has all of these names at its top level."""
    try:
        return read_settings(path).keys() >= set(names)
    except ValueError:
        return False


def config_of(kind: type[Config], values: dict[str, object], path: Path) -> Config:
    """The dataclass with these values, read from `path`, over its defaults."""
    # Model folders come from strangers, and OmegaConf would replace ${oc.env:SECRET}.
    if "${" in str(values):
        raise ValueError(f"{path}: has ${{...}} in it, which is not filled in here; write the value itself")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), _with_new_names(values)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {reason}") from error


def _with_new_names(values: object) -> object:
    """The values with the new names of renamed fields."""
    if isinstance(values, dict):
        return {RENAMED_FIELDS.get(name, name): _with_new_names(value) for name, value in values.items()}
    return values


def write_config(config: object, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
