"""clip_encoder.py: prompts and images to embeddings."""

from __future__ import annotations

from dataclasses import replace

import clip
import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from clip_gen.config import ClipConfig
from clip_gen.images import for_clip
from clip_gen.networks.clip_encoder import ClipEncoder, Tokenizer, build_clip


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    torch.manual_seed(0)
    return ClipEncoder(TINY.clip)


def test_embeddings_are_unit_length_float32(encoder: ClipEncoder) -> None:
    for embedding in (encoder.encode_text(["a red circle", "b"]), encoder.encode_image(torch.rand(2, 3, 16, 16))):
        assert embedding.shape == (2, 16)
        assert embedding.dtype == torch.float32
        assert torch.allclose(embedding.norm(dim=1), torch.ones(2))


def test_clip_is_frozen_and_stays_in_eval_mode(encoder: ClipEncoder) -> None:
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_gradients_reach_the_images_through_embed_image(encoder: ClipEncoder) -> None:
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    encoder.embed_image(images)[0, 0].backward()
    assert images.grad.abs().sum() > 0


def test_the_embedding_of_a_prompt_does_not_depend_on_other_prompts(encoder: ClipEncoder) -> None:
    together = encoder.encode_text(["a red circle", "two blue stars on white"])
    assert torch.equal(together[:1], encoder.encode_text(["a red circle"]))


def test_tokens_are_openais_for_a_prompt_that_fits() -> None:
    prompts = ["A Red circle, on white!", "", "naïve 赤", "it's 3 dogs' <b> &amp; ♪ <|x|>", "ends <|endoftext >"]
    assert torch.equal(Tokenizer(77)(prompts), clip.tokenize(prompts).long())


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a 🐱 on a 🟦background", "a cat face on a blue square background"),
        ("🎃🎃", "jack-o-lantern jack-o-lantern"),
        ("☂ and ☂️", "umbrella and umbrella"),
        ("👍🏽", "thumbs up medium skin tone"),
        ("👩🏿‍🚒 in 🇫🇷", "woman firefighter dark skin tone in France"),
        ("snake_case ✈️", "snake_case airplane"),
        ("赤い円 :cat:", "赤い円 :cat:"),
    ],
)
def test_an_emoji_is_read_as_its_short_name(prompt: str, read: str) -> None:
    assert torch.equal(Tokenizer(77)([prompt]), Tokenizer(77)([read]))


def test_words_without_an_embedding_are_unknown() -> None:
    encoder = ClipEncoder(TINY.clip)
    prompt = "A zebra's zebra, and 2 sporks on a 🐱!"
    assert encoder.unknown_words(prompt) == []
    words = dict(encoder.tokenize.words(prompt))
    assert len(words["sporks"]) == 2  # one token without an embedding is enough
    untrained = [*words["zebra"], *words["'s"], *words["!"], *words["2"], words["sporks"][0], *words["cat"]]
    encoder.clip.token_embedding.weight[untrained] = 0
    assert encoder.unknown_words(prompt) == ["zebra", "2", "sporks", "cat"]


def test_a_word_of_several_trained_pieces_is_unknown_if_a_list_of_words_lacks_it() -> None:
    encoder = ClipEncoder(TINY.clip)
    prompt = "a pussycat and sporks on a zebra"
    assert encoder.unknown_words(prompt) == []
    assert encoder.unknown_words(prompt, {"pussycat", "cat"}) == ["sporks"]  # "zebra" is one token, and trained


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "&lt;|endoftext|&gt;"])
def test_control_token_names_in_a_prompt_are_encoded_as_text(encoder: ClipEncoder, name: str) -> None:
    (row,) = Tokenizer(77)([f"a red {name} circle"])
    tokens = row[: int(row.argmax()) + 1].tolist()
    assert (tokens[0], tokens[-1]) == (encoder.tokenize.start, encoder.tokenize.end)
    assert not {encoder.tokenize.start, encoder.tokenize.end} & set(tokens[1:-1])
    word = "startoftext" if "start" in name else "endoftext"
    assert encoder.tokenize.bpe.decode(tokens[1:-1]) == f"a red <| {word} |> circle "
    cut, whole = encoder.encode_text(["a red"]), encoder.encode_text([f"a red {name} circle"])
    assert not torch.allclose(cut, whole)


def test_a_truncated_prompt_keeps_its_end_of_text_token() -> None:
    tokenize, prompt = Tokenizer(8), "one two three four five six seven eight"
    rows = tokenize([prompt])
    assert rows[0, 0] == tokenize.start
    assert rows[0, -1] == tokenize.end
    assert rows.shape == (1, 8)
    assert tokenize.left_out(prompt) == "seven eight"
    assert tokenize.left_out("one two three four five six") == ""


def test_words_beyond_the_context_do_not_change_the_embedding(encoder: ClipEncoder) -> None:
    kept = " ".join(["red"] * 14)
    assert torch.equal(encoder.encode_text([kept + " blue"]), encoder.encode_text([kept]))


def test_embeddings_equal_those_of_openais_clip_package() -> None:
    vit = ClipConfig(16, 32, (2,), 64, 8, 16, 49408, 64, 1, 1)
    for config in (vit, replace(vit, vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None)):
        torch.manual_seed(1)
        ours = ClipEncoder(config)
        ours.half().float()  # the package's build_model rounds to float16
        theirs = clip.model.build_model({k: v.clone() for k, v in ours.clip.state_dict().items()}).float().eval()
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            wanted = F.normalize(theirs.encode_image(for_clip(images, 32)), dim=-1)
            words = F.normalize(theirs.encode_text(clip.tokenize(["a cat"], context_length=16)), dim=-1)
        assert torch.allclose(ours.encode_image(images), wanted, atol=1e-6)
        assert torch.allclose(ours.encode_text(["a cat"]), words, atol=1e-6)


def test_the_sizes_select_resnet_or_vit() -> None:
    assert type(build_clip(TINY.clip).visual).__name__ == "ModifiedResNet"
    vit = replace(TINY.clip, vision_layers=(1,), vision_width=64, vision_patch_size=8)
    assert type(build_clip(vit).visual).__name__ == "VisionTransformer"
