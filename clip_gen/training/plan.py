"""What a training is told, and what follows from that and from how many pictures there are."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, fields, replace

from clip_gen.config import GPTConfig, ModelConfig, VQGANConfig
from clip_gen.training.stage import FitConfig
from clip_gen.training.vqgan_trainer import VQGANLoss

STAGES = ("both", "vqgan", "transformer")
TOKENS = ("auto", "keep", "learn")
PRECISIONS = ("auto", "32-true", "bf16-mixed")

# From a laptop's to the published model's. `local` tokens are learnt soonest; they leave detail to the decoder. In an
# hour on two cores a small transformer learns more than a large one, for it gets to see many times as many pictures.
SIZES: dict[str, tuple[VQGANConfig, GPTConfig]] = {
    "laptop": (
        VQGANConfig(
            resolution=64,
            patch=4,
            local=True,
            ch=96,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=(),
            z_channels=96,
        ),
        GPTConfig(n_layer=4, n_head=3, n_embd=192, rotary=True, looks_around=True),
    ),
    "small": (
        VQGANConfig(resolution=128, ch=64, ch_mult=(1, 2, 2, 4), z_channels=128),
        GPTConfig(n_layer=12, n_head=8, n_embd=512, rotary=True),
    ),
    "medium": (VQGANConfig(), GPTConfig(n_layer=12, n_head=12, n_embd=768, rotary=True)),
    "published": (VQGANConfig(), GPTConfig(n_layer=24, n_head=16, n_embd=1024, rotary=True)),
}
TRAINED = "trained"  # the name of any model that was
# Up to so many pictures, so many codes.
CODES_PER_PICTURES = ((200, 256), (2_000, 512), (50_000, 1024), (500_000, 4096))
LEAST_CODES, MOST_CODES = 16, 16384

# A VQGAN's by its levels, for deep ones take less. A transformer's for a width of 256, and wider ones take less in the
# measure that they are, arXiv 2203.03466: AdamW's for all but its blocks' matrices, Muon's for those.
VQGAN_RATES = {1: 2e-3, 2: 2e-3, 3: 1e-3, 4: 1e-3, 5: 3e-4}
GPT_RATES, GPT_WIDTH = {"scratch": 4.5e-3, "base": 0.9e-3}, 256
MUON_RATES = {"scratch": 6e-3, "base": 3.6e-3}
KNOWN = 0.6  # of a VQGAN's rate, for what it knows already is not to be swept away

# Enough passes for few pictures, enough steps for many; (least, passes, most).
VQGAN_STEPS = {"scratch": (4_000, 100, 60_000), "base": (1_500, 30, 20_000)}
GPT_STEPS = {"scratch": (5_000, 150, 100_000), "base": (2_000, 50, 40_000)}


@dataclass(frozen=True)
class TrainSettings:
    """What a person may say of a training; 0 and "" leave it to the plan."""

    stage: str = "both"
    tokens: str = "auto"
    base: str = ""
    size: str = "base"
    resolution: int = 0
    codebook_size: int = 0
    vqgan_steps: int = 0
    transformer_steps: int = 0
    batch_size: int = 0
    vqgan_learning_rate: float = 0.0
    transformer_learning_rate: float = 0.0
    perceptual_weight: float = 0.2
    adversarial_weight: float = 0.1
    embedding_noise: float = 0.5
    condition_dropout: float = 0.1
    condition_blur: float = 0.25
    mean_shift: float = 1.0
    contrast_weight: float = 0.0
    embedding_loss_weight: float = 0.0
    crop: bool = True
    flip: bool = True
    shift: bool = False
    sample_prompts: str = ""
    precision: str = "auto"
    max_minutes: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError with the value and the remedy."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"{field.name} is {value}; give 0 or more")
        if self.codebook_size and not LEAST_CODES <= self.codebook_size <= MOST_CODES:
            raise ValueError(
                f"codebook_size is {self.codebook_size}; give {LEAST_CODES} to {MOST_CODES}, or 0 for a size "
                "that suits the number of pictures"
            )
        choices = {"stage": STAGES, "tokens": TOKENS, "size": ("base", *SIZES), "precision": PRECISIONS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} is "{getattr(self, name)}"; it takes one of {", ".join(allowed)}')
        if self.size == "base":
            for name in ("resolution", "codebook_size"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but the base model has its own; "
                        f"leave it out, or train from scratch with size one of {', '.join(SIZES)}"
                    )
        elif self.tokens == "keep":
            raise ValueError(f"tokens is keep, but new networks have none yet: leave out size {self.size}")
        elif self.stage == "transformer":
            raise ValueError(f"stage transformer needs the base model's VQGAN: leave out size {self.size}")
        if self.stage == "transformer" and self.tokens != "auto":
            raise ValueError(f"tokens is {self.tokens}, but stage transformer leaves the VQGAN as it is: leave it out")
        for name in ("condition_dropout", "condition_blur"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give less than 1")


@dataclass(frozen=True)
class Plan:
    """Everything decided."""

    model: ModelConfig
    vqgan: FitConfig
    vqgan_loss: VQGANLoss
    transformer: FitConfig
    views: int  # of each picture for the transformer: crops, flips and shifts


def plan(settings: TrainSettings, base: ModelConfig, pictures: int, on_gpu: bool = False) -> Plan:
    """ValueError where the sizes asked for do not go together."""
    start = "base" if settings.size == "base" else "scratch"
    model = replace(base, name=TRAINED) if start == "base" else _model(settings, base, pictures)
    model = replace(model, bridge=replace(model.bridge, mean_shift=settings.mean_shift))
    model.check()
    # More and smaller steps learn more from as many pictures, a VQGAN above all; a GPU takes many as fast as few.
    batch = 32 if on_gpu and model.vqgan.resolution <= 128 and pictures >= 1000 else 16
    vqgan_batch = settings.batch_size or (batch if on_gpu else batch // 2)
    batch = settings.batch_size or batch
    vqgan_rate = (KNOWN if start == "base" else 1.0) * VQGAN_RATES.get(len(model.vqgan.ch_mult), 3e-4)
    vqgan_rate = settings.vqgan_learning_rate or vqgan_rate
    gpt_rate = GPT_RATES[start] * min(1.0, GPT_WIDTH / model.gpt.n_embd)
    gpt_rate = settings.transformer_learning_rate or gpt_rate

    def steps(asked: int, usual: tuple[int, int, int], batch: int) -> int:
        least, passes, most = usual
        return asked or min(most, max(least, passes * pictures // batch))

    vqgan = FitConfig(
        steps=steps(settings.vqgan_steps, VQGAN_STEPS[start], vqgan_batch),
        batch_size=vqgan_batch,
        learning_rate=vqgan_rate,
        # For the convolutions of flat ones, which it was measured with; deep ones have AdamW alone.
        muon_rate=vqgan_rate if len(model.vqgan.ch_mult) == 1 else 0.0,
        weight_decay=0.0,
        ema_decay=0.995,
        precision=settings.precision,
    )
    transformer = FitConfig(
        steps=steps(settings.transformer_steps, GPT_STEPS[start], batch),
        batch_size=batch,
        learning_rate=gpt_rate,
        muon_rate=MUON_RATES[start] / GPT_RATES[start] * gpt_rate,
        weight_decay=0.05,
        ema_decay=0.995,
        patience=4,
        precision=settings.precision,
    )
    loss = VQGANLoss(settings.perceptual_weight, settings.adversarial_weight)
    minutes = settings.max_minutes
    return Plan(model, _in_step(vqgan, minutes), loss, _in_step(transformer, minutes), _views(settings, pictures))


def _views(settings: TrainSettings, pictures: int) -> int:
    """Some 40,000 views are learnt from without learning them by heart, and 400,000 fit any disk."""
    if not (settings.crop or settings.shift):
        return 2 if settings.flip else 1
    return max(1, min(32, max(8, 40_000 // pictures), 400_000 // pictures))


def _in_step(config: FitConfig, minutes: float) -> FitConfig:
    """Warmed up in a twentieth, looked at forty times, and compiled where that pays."""
    long = config.steps >= 1000 and (minutes == 0 or minutes >= 20)
    return replace(
        config,
        warmup=min(50, config.steps // 20 + 1),
        validate_every=max(1, config.steps // 40),
        compile=long and shutil.which("g++") is not None,
    )


def _model(settings: TrainSettings, base: ModelConfig, pictures: int) -> ModelConfig:
    """New networks of a size, for the base's CLIP."""
    vqgan, gpt = SIZES[settings.size]
    codes = next((codes for up_to, codes in CODES_PER_PICTURES if pictures <= up_to), MOST_CODES)
    codes = settings.codebook_size or codes
    vqgan = replace(vqgan, resolution=settings.resolution or vqgan.resolution, codebook_size=codes)
    fold = vqgan.patch * 2 ** (len(vqgan.ch_mult) - 1)
    if vqgan.resolution % fold:
        raise ValueError(f"resolution is {vqgan.resolution}; size {settings.size} takes multiples of {fold}")
    if vqgan.attn_resolutions:
        vqgan = replace(vqgan, attn_resolutions=(vqgan.grid,))
    gpt = replace(gpt, block_size=vqgan.grid**2, codebook_size=codes, embed_dim=base.clip.embed_dim)
    return replace(base, name=TRAINED, vqgan=vqgan, gpt=gpt)


def prompts_of(sample_prompts: str) -> list[str]:
    """The setting's prompts, which stand with | between them."""
    return [prompt.strip() for prompt in sample_prompts.split("|") if prompt.strip()]
