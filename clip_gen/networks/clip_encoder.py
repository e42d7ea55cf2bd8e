"""Frozen CLIP: prompts and images to unit-length embeddings in one space, with OpenAI's `clip` package."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from functools import cache

import emoji
import regex
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_gen.config import ClipConfig
from clip_gen.images import for_clip

with warnings.catch_warnings():
    # `clip` imports pkg_resources, which warns. requirements.txt pins a setuptools that still has it.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from clip.model import CLIP, ResidualAttentionBlock, VisionTransformer
    from clip.simple_tokenizer import SimpleTokenizer

# The start of the regular expression with which OpenAI's tokenizer splits a prompt. It is removed, so that a prompt
# with the name of a control token cannot end the text.
CONTROL_TOKENS = r"<\|startoftext\|>|<\|endoftext\|>|"
WORD_END = "</w>"  # ends the last token of each word in OpenAI's vocabulary


class Tokenizer:
    """OpenAI's byte-pair encoding, truncated to the context length. Emoji are read as their names."""

    def __init__(self, context_length: int):
        self.bpe = _byte_pair_encoding()
        self.context_length = context_length
        self.start = self.bpe.encoder["<|startoftext|>"]
        self.end = self.bpe.encoder["<|endoftext|>"]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, context_length) int64, zeros after the end-of-text token. Truncates long prompts."""
        rows = torch.zeros(len(prompts), self.context_length, dtype=torch.long)
        for row, prompt in zip(rows, prompts, strict=True):
            # Truncates the text, not the end-of-text token, whose features are the embedding.
            kept = self.encode(prompt)[: self.context_length - 2]
            row[: len(kept) + 2] = torch.tensor([self.start, *kept, self.end])
        return rows

    def left_out(self, prompt: str) -> str:
        """The truncated end of a prompt; empty if all of it fits."""
        return self.bpe.decode(self.encode(prompt)[self.context_length - 2 :]).strip()

    def encode(self, prompt: str) -> list[int]:
        """The token ids of all words, without start and end."""
        return self.bpe.encode(with_emoji_named(prompt))

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words and punctuation of a prompt, each with its token ids."""
        found, ids = [], []
        for token in self.encode(prompt):
            ids.append(token)
            if self.bpe.decoder[token].endswith(WORD_END):
                found.append((self.bpe.decode(ids).strip(), ids))
                ids = []
        return found


def with_emoji_named(text: str) -> str:
    """The text with each emoji replaced by its CLDR short name, for example "🐱" by "cat face".

    OpenAI's vocabulary has most emoji only as pieces of their UTF-8 bytes. A CLIP learns little about these, and one
    that was trained on captions without emoji nothing; but it knows the words of the names.
    """
    if text.isascii():
        return text
    return emoji.replace_emoji(text, lambda _, about: f" {about['en'].strip(':').replace('_', ' ')} ")


@cache
def _byte_pair_encoding() -> SimpleTokenizer:
    """OpenAI's vocabulary, which takes 0.2 seconds to read, with a regular expression without control tokens."""
    bpe = SimpleTokenizer()
    pattern = bpe.pat.pattern
    assert pattern.startswith(CONTROL_TOKENS), pattern
    bpe.pat = regex.compile(pattern.removeprefix(CONTROL_TOKENS), regex.IGNORECASE)
    return bpe


class ClipEncoder(nn.Module):
    """OpenAI's CLIP: frozen, float32, always in eval mode."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.clip = build_clip(config).float().eval().requires_grad_(False)
        self.tokenize = Tokenizer(config.context_length)

    def train(self, mode: bool = True) -> ClipEncoder:
        """Ignores `mode`: the statistics of its batch norms must not change."""
        return super().train(False)

    def unknown_words(self, prompt: str, listed: Collection[str] = ()) -> list[str]:
        """The words of a prompt, each once, with a token that this CLIP was not trained on: its embedding is zero.

        OpenAI's CLIP has no such token. listed: words that it knows, if there is a list; then a word of several tokens
        that is not among them is unknown too, since pieces of words that it knows may make up any other word.
        """
        words = [(word, ids) for word, ids in self.tokenize.words(prompt) if word[0].isalnum()]
        tokens = sorted({token for _, ids in words for token in ids})
        is_trained = self.clip.token_embedding.weight[tokens].any(dim=1).tolist()  # at once: a GPU answers slowly
        untrained = {token for token, trained in zip(tokens, is_trained, strict=True) if not trained}
        pieced = {word for word, ids in words if len(ids) > 1 and listed and word not in listed}
        return list(dict.fromkeys(word for word, ids in words if word in pieced or untrained.intersection(ids)))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit-length embeddings, (B, E) float32. Encodes prompts one by one, so that their bits do not depend on B."""
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
        """The outputs of the four quarters of the image encoder, (B, C, ...), for images (B, 3, S, S) in [-1, 1].

        Gradients flow to the images. An encoder with fewer than four blocks gives one output per block.
        """
        visual, outputs = self.clip.visual, []
        vit = isinstance(visual, VisionTransformer)
        blocks = visual.transformer.resblocks if vit else [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        quarters = sorted({max(1, len(blocks) * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})

        def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output)

        hooks = [blocks[i].register_forward_hook(keep_output) for i in quarters]
        try:
            self.embed_image(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [output.permute(1, 2, 0) for output in outputs] if vit else outputs  # a ViT's are (L, B, C)


def build_clip(config: ClipConfig) -> CLIP:
    """OpenAI's CLIP of these sizes, randomly initialised."""
    layers = config.vision_layers
    # The fields of the config have the names of CLIP's arguments.
    sizes = vars(config) | {"vision_layers": layers[0] if len(layers) == 1 else layers}
    activation = sizes.pop("activation")
    clip = CLIP(**sizes)
    if activation == "gelu":
        for block in clip.modules():
            if isinstance(block, ResidualAttentionBlock):
                block.mlp.gelu = nn.GELU()
    return clip
