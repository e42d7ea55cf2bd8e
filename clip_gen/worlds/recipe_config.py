"""The settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from clip_gen.config import ModelConfig
from clip_gen.training.stage import FitConfig


@dataclass(frozen=True)
class RecipeConfig:
    world: str = "shapes"
    model: ModelConfig = field(default_factory=ModelConfig)
    start: str = ""  # a model folder of the same sizes, whose sketch and transformer are trained further; "": none
    seed: int = 0
    clip_fit: FitConfig = field(default_factory=FitConfig)
    vqgan_fit: FitConfig = field(default_factory=FitConfig)
    sketch_fit: FitConfig = field(default_factory=FitConfig)
    gpt_fit: FitConfig = field(default_factory=FitConfig)
    encoded_pictures: int = 100_000
    hard_pictures: int = 0  # that the transformer trains on besides these
    embedding_noise: float = 0.5
    condition_dropout: float = 0.1
    condition_blur: float = 0.25
    context_noise: float = 0.0
    contrast: float = 0.0
    temperature: float = 1.0  # that the transformer has at temperature 1 after training
    text_steps: int = 1500
    word_steps: int = 500
    ranker_fit: FitConfig = field(default_factory=FitConfig)
    drawn_pictures: int = 8000
