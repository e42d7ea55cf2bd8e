"""The settings of a training, and the plan made from them and the number of pictures."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from clip_gen.config import GPTConfig, ModelConfig, VQGANConfig
from clip_gen.prompts import parse_prompt, split_prompts
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANLoss
from clip_gen.weights.importers.openai_clip import SHA256

STAGES = ("both", "vqgan", "transformer")
TOKENS = ("auto", "keep", "learn")
CLIPS = tuple(SHA256)  # of OpenAI
PRECISIONS = ("auto", "32-true", "bf16-mixed")
LORA = ("auto", "on", "off")

# `local` tokens are learnt fastest; they leave detail to the decoder.
LAPTOP_VQGAN = VQGANConfig(
    resolution=64, patch=4, local=True, ch=96, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), z_channels=96
)
LAPTOP_GPT = GPTConfig(n_layer=4, n_head=3, n_embd=192, rotary=True, neighbour_context=True)
# In an hour on two cores a small transformer learns more than a large one, because it sees many times as many pictures.
MODEL_SIZES: dict[str, tuple[VQGANConfig, GPTConfig]] = {
    "laptop": (LAPTOP_VQGAN, LAPTOP_GPT),
    "laptop-128": (replace(LAPTOP_VQGAN, resolution=128, patch=8), LAPTOP_GPT),  # as many tokens, of larger squares
    "laptop-256": (replace(LAPTOP_VQGAN, resolution=256, patch=16), LAPTOP_GPT),
    "small": (
        VQGANConfig(resolution=128, ch=64, ch_mult=(1, 2, 2, 4), z_channels=128),
        GPTConfig(n_layer=12, n_head=8, n_embd=512, rotary=True),
    ),
    "medium": (VQGANConfig(), GPTConfig(n_layer=12, n_head=12, n_embd=768, rotary=True)),
    "published": (VQGANConfig(), GPTConfig(n_layer=24, n_head=16, n_embd=1024, rotary=True)),
}
TRAINED = "trained"  # the name of every trained model
# Maximum number of pictures, and the codebook size for it.
CODES_PER_PICTURES = ((200, 256), (2_000, 512), (50_000, 1024), (500_000, 4096))
MIN_RESOLUTION = 16  # smaller pictures are too small for the discriminator
MIN_CODES, MAX_CODES = 16, 16384

# Learning rates. A VQGAN's depend on its number of levels. A transformer's are for a width of GPT_WIDTH and shrink in
# proportion to a greater one, arXiv 2203.03466. Its blocks' matrices have Muon's rates, the rest AdamW's.
VQGAN_RATES = {1: 2e-3, 2: 2e-3, 3: 1e-3, 4: 1e-3, 5: 3e-4}
GPT_RATES, GPT_WIDTH = {"scratch": 4.5e-3, "base": 0.9e-3, "few": 3e-3}, 256
MUON_RATES = {"scratch": 6e-3, "base": 3.6e-3, "few": 0.0}
FINE_TUNING_FACTOR = 0.6  # on a VQGAN's rate, so fine-tuning does not destroy what it has learnt

# (minimum steps, passes over the pictures, maximum steps)
VQGAN_STEPS = {"scratch": (4_000, 100, 60_000), "base": (1_500, 30, 20_000), "few": (300, 30, 20_000)}
GPT_STEPS = {"scratch": (5_000, 150, 100_000), "base": (2_000, 50, 40_000), "few": (1_200, 50, 40_000)}

# Few pictures: LoRA trains a small part of the base's transformer, and augmentation is stronger.
FEW_PICTURES = 200
LORA_RANK = 32
CROP, FEW_CROP = 0.8, 0.65  # the smallest random crop, as a fraction of the shorter side


def setting(default: object, description: str, **limits: object) -> Any:
    """A field of TrainSettings, with its description and limits: ge, le, max_length and choices, as in Cog's Input().

    train.py repeats them, because Cog reads that file without running it; a test compares the two.
    """
    return field(default=default, metadata={"description": description, **limits})


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training; 0 and "" leave the choice to plan()."""

    stage: str = setting("both", "Stages to train. vqgan: stage 1 only, to be used as a base.", choices=STAGES)
    tokens: str = setting(
        "auto",
        "keep: train only the decoder. learn: train new tokens. auto: keep if the base reconstructs well.",
        choices=TOKENS,
    )
    lora: str = setting(
        "auto",
        "on: LoRA and strong augmentation, for few pictures. auto: on up to 200 pictures.",
        choices=LORA,
    )
    base: str = setting(
        "auto",
        "auto: the default model if it knows such pictures, else published weights. Or a URL or a path.",
    )
    base_clip: str = setting(
        "ViT-B/32",
        "OpenAI's CLIP for base auto, downloaded if the default model does not know the pictures.",
        choices=CLIPS,
    )
    size: str = setting(
        "base",
        "base: fine-tune the base model. Others: train new networks of this size with the base's CLIP.",
        choices=("base", *MODEL_SIZES),
    )
    resolution: int = setting(0, "Side of the pictures of new networks, a multiple of 16. 0: by size.", ge=0, le=1024)
    codebook_size: int = setting(0, "Codes of a new VQGAN, 16 or more. 0: by number of pictures.", ge=0, le=16384)
    vqgan_steps: int = setting(0, "Steps of stage 1. 0: by number of pictures.", ge=0, le=1000000)
    transformer_steps: int = setting(0, "Maximum steps of stage 2. 0: by number of pictures.", ge=0, le=1000000)
    batch_size: int = setting(0, "Pictures per step. 0: by number of pictures and hardware.", ge=0, le=4096)
    vqgan_learning_rate: float = setting(0.0, "Learning rate, stage 1. 0: default.", ge=0, le=0.1)
    transformer_learning_rate: float = setting(0.0, "Learning rate, stage 2. 0: default.", ge=0, le=0.1)
    perceptual_weight: float = setting(0.2, "Weight of the perceptual loss: LPIPS if pulled, else CLIP.", ge=0, le=100)
    adversarial_weight: float = setting(0.1, "Weight of the discriminator's loss.", ge=0, le=100)
    embedding_noise: float = setting(0.5, "Maximum length of the noise that is added to embeddings.", ge=0, le=10)
    condition_dropout: float = setting(
        0.1, "Share of samples without a condition. Guidance needs more than 0.", ge=0, le=0.9
    )
    condition_blur: float = setting(0.25, "Share of pictures with blurred embeddings, for vague prompts.", ge=0, le=0.9)
    mean_shift: float = setting(1.0, "Shift of prompts towards the mean of the pictures. 1: all of it.", ge=0, le=4)
    contrast_weight: float = setting(0.0, "Weight of a loss separating similar pictures; slow. 0: off.", ge=0, le=100)
    embedding_loss_weight: float = setting(0.0, "Weight of CLIP-GEN's embedding loss; slow. 0: off.", ge=0, le=100)
    crop: bool = setting(True, "Train on random crops too.")
    flip: bool = setting(True, "Train on mirrored pictures too. Turn it off for text and faces.")
    shift: bool = setting(False, "Move drawings and logos over their plain background.")
    drop_similar: float = setting(
        0.0, "Drop pictures whose CLIP embedding has this cosine, or more, with another's. 0: keep all.", ge=0, le=1
    )
    letterbox: bool = setting(False, "Show pictures whole, with bars, instead of cutting squares out of them.")
    sample_prompts: str = setting("", "Prompts drawn for the report, one a line.", max_length=2000)
    precision: str = setting("auto", "auto: bfloat16 if supported.", choices=PRECISIONS)
    gradient_checkpointing: bool = setting(
        False, "Compute activations again instead of keeping them: less memory, slower steps."
    )
    max_minutes: float = setting(0.0, "Time limit, after which weights are saved. 0: none.", ge=0)
    seed: int = setting(0, "The same seed and number of CPU threads give the same weights.", ge=0, le=2147483647)

    @property
    def chooses_base(self) -> bool:
        return self.base in ("", "auto")

    def check(self) -> None:
        """Raises ValueError with the value and the remedy."""
        for spec in fields(self):
            check_limits(spec.name, getattr(self, spec.name), spec.metadata)
        for prompt in split_prompts(self.sample_prompts):
            parse_prompt(prompt, "a sample prompt")
        if 0 < self.codebook_size < MIN_CODES:
            raise ValueError(f"codebook_size is {self.codebook_size}; give {MIN_CODES} or more, or 0 for the usual one")
        is_new = self.size != "base"
        if not is_new and (self.resolution or self.codebook_size):
            name, value = ("resolution", self.resolution) if self.resolution else ("codebook_size", self.codebook_size)
            sizes = ", ".join(MODEL_SIZES)
            raise ValueError(f"{name} is {value}, but the base model has its own; leave it out, or give size {sizes}")
        if is_new and self.tokens == "keep":
            raise ValueError(f"tokens is keep, but new networks have none yet: leave out size {self.size}")
        if is_new and self.stage == "transformer":
            raise ValueError(f"stage transformer needs the base model's VQGAN: leave out size {self.size}")
        if self.stage == "transformer" and self.tokens != "auto":
            raise ValueError(f"tokens is {self.tokens}, but stage transformer leaves the VQGAN as it is: leave it out")
        if self.lora == "on" and (is_new or self.tokens == "learn"):
            given = f"size {self.size}" if is_new else "tokens learn"
            raise ValueError(f"lora is on, but it needs the base's transformer and its tokens: leave out {given}")


def check_limits(name: str, value: object, limits: Mapping[str, Any]) -> None:
    """Raises ValueError with the value and the remedy. limits: a field's metadata."""
    if value not in limits.get("choices", [value]):
        raise ValueError(f'{name} is "{value}"; it takes one of {", ".join(limits["choices"])}')
    if isinstance(value, int | float):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; give 0 or more")
        if value > limits.get("le", math.inf):
            raise ValueError(f"{name} is {value}; give {limits['le']} or less")


@dataclass(frozen=True)
class Tokens:
    """What becomes of the tokens of a training's base.

    kept: its encoder and codebook are not trained. known: kept, and the base's transformer was trained on them.
    very_well: its VQGAN was measured, and reconstructs the pictures so well that it needs no training.
    """

    kept: bool = False
    known: bool = False
    very_well: bool = False


NEW_TOKENS = Tokens()


@dataclass(frozen=True)
class Plan:
    """The model to train and how each stage trains it."""

    model: ModelConfig
    vqgan: FitConfig
    vqgan_loss: VQGANLoss
    transformer: FitConfig
    views: int  # of each picture for the transformer: crops, flips and shifts
    squares: str  # how pictures of other shapes become squares
    lora_rank: int = 0  # of the additions to the transformer's matrices; 0: all of it is trained

    def augmentation(self, settings: TrainSettings) -> dict[str, float | bool]:
        """The arguments of Squares beside the resolution."""
        few = self.lora_rank > 0
        crop = (FEW_CROP if few else CROP) if settings.crop else 1.0
        how = {"crop": crop, "flip": settings.flip, "shift": settings.shift, "letterbox": settings.letterbox}
        return how | {"scatter": few and settings.crop}


def plan(
    settings: TrainSettings,
    base: ModelConfig,
    pictures: int,
    on_gpu: bool = False,
    new_transformer: bool = False,
    tokens: Tokens = NEW_TOKENS,
) -> Plan:
    """The plan for so many pictures; ValueError if the settings do not fit together, or LoRA does not fit the base.

    new_transformer: the base has none.
    """
    few = _uses_lora(settings, pictures, tokens)
    model = replace(base, name=TRAINED) if settings.size == "base" else _new_model(settings, base, pictures)
    model = replace(model, bridge=replace(model.bridge, mean_shift=settings.mean_shift))
    model.check()
    # Small batches learn more from the same number of pictures, above all a VQGAN; a GPU is as fast with large ones.
    batch = 32 if on_gpu and model.vqgan.resolution <= 128 and pictures >= 1000 else 16
    start = "scratch" if settings.size != "base" else "few" if few else "base"
    vqgan = _vqgan_fit(settings, model, pictures, settings.batch_size or (batch if on_gpu else batch // 2), start)
    if few and tokens.very_well and not settings.vqgan_steps:
        vqgan = replace(vqgan, steps=0)
    start = "scratch" if new_transformer else start
    transformer = _transformer_fit(settings, model, pictures, settings.batch_size or batch, start)
    loss = VQGANLoss(settings.perceptual_weight, settings.adversarial_weight)
    squares = squares_in_words(settings, few)
    return Plan(model, vqgan, loss, transformer, _views(settings, pictures), squares, LORA_RANK if few else 0)


def _uses_lora(settings: TrainSettings, pictures: int, tokens: Tokens) -> bool:
    """ValueError if it was asked for, and the base's transformer does not know the tokens."""
    if settings.lora == "on" and not tokens.known:
        raise ValueError(
            "lora is on, but the base has no transformer that knows its tokens, or its VQGAN reconstructs these "
            "pictures too poorly to keep them: leave lora out, or give tokens keep or a base with a transformer"
        )
    is_chosen = settings.lora == "on" or (settings.lora == "auto" and pictures <= FEW_PICTURES)
    return is_chosen and tokens.known and settings.stage != "vqgan"


def _vqgan_fit(settings: TrainSettings, model: ModelConfig, pictures: int, batch_size: int, start: str) -> FitConfig:
    levels = len(model.vqgan.ch_mult)
    factor = 1.0 if start == "scratch" else FINE_TUNING_FACTOR
    steps = settings.vqgan_steps or _usual_steps(VQGAN_STEPS[start], pictures, batch_size)
    rate = settings.vqgan_learning_rate or factor * VQGAN_RATES.get(levels, 3e-4)
    muon_rate = rate if levels == 1 else 0.0  # Muon was measured on VQGANs with one level only
    return _scheduled(FitConfig(steps, batch_size, rate, muon_rate, weight_decay=0.0), settings)


def _transformer_fit(
    settings: TrainSettings, model: ModelConfig, pictures: int, batch_size: int, start: str
) -> FitConfig:
    steps = settings.transformer_steps or _usual_steps(GPT_STEPS[start], pictures, batch_size)
    rate = settings.transformer_learning_rate or GPT_RATES[start] * min(1.0, GPT_WIDTH / model.gpt.n_embd)
    muon_rate = MUON_RATES[start] / GPT_RATES[start] * rate
    patience = 8 if start == "few" else 4  # few pictures are held back, so their loss varies
    return _scheduled(FitConfig(steps, batch_size, rate, muon_rate, weight_decay=0.05, patience=patience), settings)


def _usual_steps(limits: tuple[int, int, int], pictures: int, batch_size: int) -> int:
    least, passes, most = limits
    return min(most, max(least, passes * pictures // batch_size))


def _scheduled(config: FitConfig, settings: TrainSettings) -> FitConfig:
    """With warm-up in the first twentieth, about forty validations, and compilation if the stage is long enough."""
    is_long = config.steps >= 1000 and (settings.max_minutes == 0 or settings.max_minutes >= 20)
    return replace(
        config,
        warmup=min(50, config.steps // 20 + 1),
        ema_decay=0.995,
        validate_every=max(1, config.steps // 40),
        precision=settings.precision,
        compile=is_long and not settings.gradient_checkpointing and shutil.which("g++") is not None,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def _views(settings: TrainSettings, pictures: int) -> int:
    """About 40,000 views in all are enough against overfitting, and 400,000 fit on any disk."""
    if settings.shift is False and (settings.letterbox or not settings.crop):
        return 2 if settings.flip else 1
    return max(1, min(32, max(8, 40_000 // pictures), 400_000 // pictures))


def squares_in_words(settings: TrainSettings, few: bool = False) -> str:
    if settings.letterbox:
        return "letterbox: each picture whole, with bars in the colour of its edges"
    if settings.crop:
        drawings = "; drawings are shrunk and moved on their plain background instead" if few else ""
        least = FEW_CROP if few else CROP
        return (
            f"random crop: squares of {100 * least:.0f} to 100 % of the shorter side, anywhere in the picture{drawings}"
        )
    return "centre crop: the square in the middle of each picture"


def _new_model(settings: TrainSettings, base: ModelConfig, pictures: int) -> ModelConfig:
    """New networks of a size from MODEL_SIZES, for the base's CLIP."""
    vqgan, gpt = MODEL_SIZES[settings.size]
    codes = next((codes for limit, codes in CODES_PER_PICTURES if pictures <= limit), MAX_CODES)
    codes = settings.codebook_size or codes
    vqgan = replace(vqgan, resolution=settings.resolution or vqgan.resolution, codebook_size=codes)
    fold = vqgan.patch * 2 ** (len(vqgan.ch_mult) - 1)
    if vqgan.resolution % fold or vqgan.resolution < MIN_RESOLUTION:
        wanted = f"multiples of {fold} from {MIN_RESOLUTION} on"
        raise ValueError(f"resolution is {vqgan.resolution}; size {settings.size} takes {wanted}")
    if vqgan.attn_resolutions:
        vqgan = replace(vqgan, attn_resolutions=(vqgan.grid,))
    gpt = replace(gpt, block_size=vqgan.grid**2, codebook_size=codes, embed_dim=base.clip.embed_dim)
    return replace(base, name=TRAINED, vqgan=vqgan, gpt=gpt)
