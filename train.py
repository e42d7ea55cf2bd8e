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
        description="Pictures without captions, at least 8, as a zip or a tar. Over HTTP: its http, https or data URL."
    ),
    stage: str = Input(
        description="What to train. vqgan alone makes a base for the transformer.",
        default="both",
        choices=["both", "vqgan", "transformer"],
    ),
    tokens: str = Input(
        description="keep: train the decoder alone, so the base's transformer still fits. learn: all. auto: as suits.",
        default="auto",
        choices=["auto", "keep", "learn"],
    ),
    base: str | None = Input(
        description="Model to start from: https URL of a weights tar; in script/train also a path. Blank: the default.",
        default=None,
    ),
    size: str = Input(
        description="base goes on with the base model; the others train new networks of that size for its CLIP.",
        default="base",
        choices=["base", "laptop", "small", "medium", "published"],
    ),
    resolution: int = Input(
        description="Side of the pictures for new networks; multiples of 16 suit all sizes. 0: by the size.",
        default=0,
        ge=0,
        le=1024,
    ),
    codebook_size: int = Input(
        description="Codes of a new VQGAN, 16 or more. 0: by the number of pictures.", default=0, ge=0, le=16384
    ),
    vqgan_steps: int = Input(
        description="Steps of stage 1. 0: by the number of pictures.", default=0, ge=0, le=1000000
    ),
    transformer_steps: int = Input(
        description="Most steps of stage 2; it ends when it no longer improves. 0: by the number of pictures.",
        default=0,
        ge=0,
        le=1000000,
    ),
    batch_size: int = Input(
        description="Pictures a step. 0: by the pictures and the machine.", default=0, ge=0, le=4096
    ),
    vqgan_learning_rate: float = Input(description="0: the usual one.", default=0.0, ge=0, le=0.1),
    transformer_learning_rate: float = Input(description="0: the usual one.", default=0.0, ge=0, le=0.1),
    perceptual_weight: float = Input(
        description="How much reconstructions should look alike, to LPIPS if pulled, else to CLIP.",
        default=0.2,
        ge=0,
        le=100,
    ),
    adversarial_weight: float = Input(
        description="How much reconstructions should look real to a discriminator.", default=0.1, ge=0, le=100
    ),
    embedding_noise: float = Input(
        description="Most noise added to a picture's embedding; with more, looser prompts work.",
        default=0.5,
        ge=0,
        le=10,
    ),
    condition_dropout: float = Input(
        description="Share of pictures learnt without their embedding, which guidance needs.", default=0.1, ge=0, le=0.9
    ),
    condition_blur: float = Input(
        description="Share of pictures learnt from embeddings that others like them fit too, as vague prompts' do.",
        default=0.25,
        ge=0,
        le=0.9,
    ),
    mean_shift: float = Input(
        description="How far prompts are moved towards these pictures. 1: by what lies between their means.",
        default=1.0,
        ge=0,
        le=4,
    ),
    contrast_weight: float = Input(
        description="Weight of a loss that tells each picture from a similar one; takes half as long again. 0: off.",
        default=0.0,
        ge=0,
        le=100,
    ),
    embedding_loss_weight: float = Input(
        description="Weight of CLIP-GEN's second loss; slow. 0: off.", default=0.0, ge=0, le=100
    ),
    crop: bool = Input(description="Learn from random crops too.", default=True),
    flip: bool = Input(description="Learn from mirrored pictures too. Off for text and faces.", default=True),
    shift: bool = Input(description="Move about what stands on a plain ground. For drawings and logos.", default=False),
    sample_prompts: str = Input(
        description="Prompts to draw now and then for the report, with | between them.", default="", max_length=2000
    ),
    precision: str = Input(
        description="Number format of the arithmetic. auto: bfloat16 where the hardware multiplies it.",
        default="auto",
        choices=["auto", "32-true", "bf16-mixed"],
    ),
    max_minutes: float = Input(description="Stop after so long and keep what there is. 0: no end.", default=0.0, ge=0),
    seed: int = Input(
        description="The same seed trains the same weights, on a CPU with the same number of threads.",
        default=0,
        ge=0,
        le=2147483647,
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
        base=base,
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
        sample_prompts=sample_prompts,
        precision=precision,
        max_minutes=max_minutes,
        seed=seed,
        **unknown,
    )
    with one_training(scratch) as (folder, kept):
        base = await fetched_base(inputs["base"])
        inputs["base"] = str(base.path) if base else None
        # Moved, so that it is removed with the folder even if Cog's worker is killed.
        inputs["images"] = shutil.move(images, folder / "images")
        out = folder / "out"
        replaced = {str(folder / "images"): sent_name(images), f"{out}/": "", str(out): "this training"}
        await run_training(inputs, out, replaced)
        return TrainingOutput(weights=Path(keep(out, kept)))


INPUTS = read_inputs(train)
