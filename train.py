"""Cog's training: a zip of pictures in, a weights tar out. `python -m clip_gen train` does the work."""

import shutil

from cog import BaseModel, Input, Path

from clip_gen.serving.inputs import checked, read_inputs
from clip_gen.serving.train_process import keep, one_training, run_training, sent_name
from clip_gen.serving.watchdog import worker_folder


class TrainingOutput(BaseModel):
    weights: Path


async def train(
    images: Path = Input(
        description="Pictures without captions, at least 8, as a zip or tar. Over HTTP: an http, https or data URL."
    ),
    stage: str = Input(
        description="Stages to train. vqgan: stage 1 only, to be used as a base.",
        default="both",
        choices=["both", "vqgan", "transformer"],
    ),
    tokens: str = Input(
        description="keep: train only the decoder. learn: train new tokens. auto: keep if the base reconstructs well.",
        default="auto",
        choices=["auto", "keep", "learn"],
    ),
    lora: str = Input(
        description="on: LoRA and strong augmentation, for few pictures. auto: on up to 200 pictures.",
        default="auto",
        choices=["auto", "on", "off"],
    ),
    base: str = Input(
        description="auto: the default model if it knows such pictures, else published weights. Or a URL or a path.",
        default="auto",
    ),
    base_clip: str = Input(
        description="OpenAI's CLIP for base auto, downloaded if the default model does not know the pictures.",
        default="ViT-B/32",
        choices=[
            "RN50",
            "RN101",
            "RN50x4",
            "RN50x16",
            "RN50x64",
            "ViT-B/32",
            "ViT-B/16",
            "ViT-L/14",
            "ViT-L/14@336px",
        ],
    ),
    size: str = Input(
        description="base: fine-tune the base model. Others: train new networks of this size with the base's CLIP.",
        default="base",
        choices=["base", "laptop", "laptop-128", "laptop-256", "small", "medium", "published"],
    ),
    resolution: int = Input(
        description="Side of the pictures of new networks, a multiple of 16. 0: by size.", default=0, ge=0, le=1024
    ),
    codebook_size: int = Input(
        description="Codes of a new VQGAN, 16 or more. 0: by number of pictures.", default=0, ge=0, le=16384
    ),
    vqgan_steps: int = Input(description="Steps of stage 1. 0: by number of pictures.", default=0, ge=0, le=1000000),
    transformer_steps: int = Input(
        description="Maximum steps of stage 2. 0: by number of pictures.", default=0, ge=0, le=1000000
    ),
    batch_size: int = Input(
        description="Pictures per step. 0: by number of pictures and hardware.", default=0, ge=0, le=4096
    ),
    vqgan_learning_rate: float = Input(description="Learning rate, stage 1. 0: default.", default=0.0, ge=0, le=0.1),
    transformer_learning_rate: float = Input(
        description="Learning rate, stage 2. 0: default.", default=0.0, ge=0, le=0.1
    ),
    perceptual_weight: float = Input(
        description="Weight of the perceptual loss: LPIPS if pulled, else CLIP.", default=0.2, ge=0, le=100
    ),
    adversarial_weight: float = Input(description="Weight of the discriminator's loss.", default=0.1, ge=0, le=100),
    embedding_noise: float = Input(
        description="Maximum length of the noise that is added to embeddings.", default=0.5, ge=0, le=10
    ),
    condition_dropout: float = Input(
        description="Share of samples without a condition. Guidance needs more than 0.", default=0.1, ge=0, le=0.9
    ),
    condition_blur: float = Input(
        description="Share of pictures with blurred embeddings, for vague prompts.", default=0.25, ge=0, le=0.9
    ),
    mean_shift: float = Input(
        description="Shift of prompts towards the mean of the pictures. 1: all of it.", default=1.0, ge=0, le=4
    ),
    contrast_weight: float = Input(
        description="Weight of a loss separating similar pictures; slow. 0: off.", default=0.0, ge=0, le=100
    ),
    embedding_loss_weight: float = Input(
        description="Weight of CLIP-GEN's embedding loss; slow. 0: off.", default=0.0, ge=0, le=100
    ),
    crop: bool = Input(description="Train on random crops too.", default=True),
    flip: bool = Input(description="Train on mirrored pictures too. Turn it off for text and faces.", default=True),
    shift: bool = Input(description="Move drawings and logos over their plain background.", default=False),
    drop_similar: float = Input(
        description="Drop pictures whose CLIP embedding has this cosine, or more, with another's. 0: keep all.",
        default=0.0,
        ge=0,
        le=1,
    ),
    letterbox: bool = Input(
        description="Show pictures whole, with bars, instead of cutting squares out of them.", default=False
    ),
    sample_prompts: str = Input(description="Prompts drawn for the report, one a line.", default="", max_length=2000),
    precision: str = Input(
        description="auto: bfloat16 if supported.", default="auto", choices=["auto", "32-true", "bf16-mixed"]
    ),
    gradient_checkpointing: bool = Input(
        description="Compute activations again instead of keeping them: less memory, slower steps.", default=False
    ),
    max_minutes: float = Input(description="Time limit, after which weights are saved. 0: none.", default=0.0, ge=0),
    seed: int = Input(
        description="The same seed and number of CPU threads give the same weights.", default=0, ge=0, le=2147483647
    ),
    **unknown: object,
) -> TrainingOutput:
    """Trains in another process, which ends with the request. Checks its inputs, as predict.py does."""
    from clip_gen.serving.request_weights import fetched_base  # imported here, because it loads torch

    scratch = worker_folder("clip-gen-train-")  # made by the first training: Cog calls no setup for a function
    if "prompt" in unknown:
        raise ValueError("this server trains models; for predictions, start another without --x-mode train")
    inputs = checked(
        INPUTS,
        images=images,
        stage=stage,
        tokens=tokens,
        lora=lora,
        base=base,
        base_clip=base_clip,
        size=size,
        resolution=resolution,
        codebook_size=codebook_size,
        vqgan_steps=vqgan_steps,
        transformer_steps=transformer_steps,
        batch_size=batch_size,
        vqgan_learning_rate=vqgan_learning_rate,
        transformer_learning_rate=transformer_learning_rate,
        perceptual_weight=perceptual_weight,
        adversarial_weight=adversarial_weight,
        embedding_noise=embedding_noise,
        condition_dropout=condition_dropout,
        condition_blur=condition_blur,
        mean_shift=mean_shift,
        contrast_weight=contrast_weight,
        embedding_loss_weight=embedding_loss_weight,
        crop=crop,
        flip=flip,
        shift=shift,
        drop_similar=drop_similar,
        letterbox=letterbox,
        sample_prompts=sample_prompts,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        max_minutes=max_minutes,
        seed=seed,
        **unknown,
    )
    with one_training(scratch) as (folder, kept):
        base = await fetched_base(inputs["base"])
        inputs["base"] = str(base.path) if base else "auto"
        # Moved, so that it is removed with the folder even if Cog's worker is killed.
        inputs["images"] = shutil.move(images, folder / "images")
        out = folder / "out"
        replaced = {str(folder / "images"): sent_name(images), f"{out}/": "", str(out): "this training"}
        await run_training(inputs, out, replaced)
        return TrainingOutput(weights=Path(keep(out, kept, scratch)))


INPUTS = read_inputs(train)
