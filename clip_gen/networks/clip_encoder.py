"""Frozen CLIP: prompts or images -> unit-length embeddings in one space. The only door to OpenAI's `clip`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import regex
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import ClipConfig
from clip_gen.images import for_clip

with warnings.catch_warnings():
    # The package asks setuptools for pkg_resources on every start; requirements.txt has seen to that.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from clip.model import CLIP, ResidualAttentionBlock
    from clip.simple_tokenizer import SimpleTokenizer

# How OpenAI's tokenizer splits a prompt begins with the names of its two control tokens. Prompts are text: no name in
# one may end it, so these are not matched.
CONTROL_TOKENS = r"<\|startoftext\|>|<\|endoftext\|>|"


class Tokenizer:
    """OpenAI's byte-pair encoding of text, cut to a context length without losing the end-of-text token."""

    def __init__(self, context_length: int):
        self.bpe = SimpleTokenizer()
        pattern = self.bpe.pat.pattern
        assert pattern.startswith(CONTROL_TOKENS), pattern
        self.bpe.pat = regex.compile(pattern.removeprefix(CONTROL_TOKENS), regex.IGNORECASE)
        self.context_length = context_length
        self.start = self.bpe.encoder["<|startoftext|>"]
        self.end = self.bpe.encoder["<|endoftext|>"]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, context_length) int64, zeros after the end-of-text token. The end of a long prompt is left out."""
        rows = torch.zeros(len(prompts), self.context_length, dtype=torch.long)
        for row, prompt in zip(rows, prompts, strict=True):
            # CLIP pools at the end-of-text token, so it is words that are left out.
            kept = self.bpe.encode(prompt)[: self.context_length - 2]
            row[: len(kept) + 2] = torch.tensor([self.start, *kept, self.end])
        return rows

    def left_out(self, prompt: str) -> str:
        """The end of a prompt that does not fit the context; empty when all of it fits."""
        return self.bpe.decode(self.bpe.encode(prompt)[self.context_length - 2 :]).strip()


class ClipEncoder(nn.Module):
    """OpenAI's CLIP as two functions. Built frozen, float32, in eval mode."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.clip = build_clip(config).float().eval().requires_grad_(False)
        self.tokenize = Tokenizer(config.context_length)

    def train(self, mode: bool = True) -> ClipEncoder:
        """Stays in eval mode whatever the parent asks: its batch norms must never move."""
        return super().train(False)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit-length embeddings, (B, E) float32. One prompt's does not depend on the others beside it."""
        tokens = self.tokenize(prompts).to(self.clip.positional_embedding.device)
        return F.normalize(torch.cat([self.clip.encode_text(row[None]) for row in tokens]), dim=-1)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-length embeddings, (B, E) float32, of images (B, 3, S, S) in [-1, 1] at any S."""
        return self.embed_image(images)

    def embed_image(self, images: Tensor) -> Tensor:
        """As encode_image, but gradients flow to the images."""
        return F.normalize(self.clip.encode_image(for_clip(images, self.config.image_resolution)), dim=-1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """What each quarter of the image tower makes of images (B, 3, S, S) in [-1, 1]: (B, C, ...), first to last.

        Gradients flow to the images.
        """
        visual, found = self.clip.visual, []
        vit = hasattr(visual, "transformer")
        blocks = visual.transformer.resblocks if vit else [getattr(visual, f"layer{i}") for i in (1, 2, 3, 4)]
        quarters = sorted({max(1, len(blocks) * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
        hooks = [blocks[i].register_forward_hook(lambda *seen: found.append(seen[-1])) for i in quarters]
        try:
            self.embed_image(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [features.permute(1, 2, 0) for features in found] if vit else found  # a ViT's are (L, B, C)


def build_clip(config: ClipConfig) -> CLIP:
    """OpenAI's class at these sizes, with its own random start."""
    layers = config.vision_layers
    # The config has the names of CLIP's own arguments.
    sizes = vars(config) | {"vision_layers": layers[0] if len(layers) == 1 else layers}
    activation = sizes.pop("activation")
    clip = CLIP(**sizes)
    if activation == "gelu":
        for block in clip.modules():
            if isinstance(block, ResidualAttentionBlock):
                block.mlp.gelu = nn.GELU()
    return clip
