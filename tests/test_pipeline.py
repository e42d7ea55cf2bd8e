"""pipeline.py: from a prompt to ranked images."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOAT16, TINY, tiny_networks
from model_files import web_server
from PIL import Image

from clip_gen import ClipGen
from clip_gen.config import BridgeConfig
from clip_gen.hardware import choose_device
from clip_gen.images import to_pil, to_tensor
from clip_gen.networks.bridge import Bridge
from clip_gen.pipeline import Stopped
from clip_gen.validation import check_prompt
from clip_gen.weights.model_folder import ModelFolderError, build, load_networks, save_networks
from clip_gen.weights.tarball import pack


def test_images_are_ranked_by_their_clip_scores(tiny_model: ClipGen) -> None:
    result = tiny_model.generate("a red circle", candidates=8, num_outputs=8, seed=1)
    assert [image.size for image in result.images] == [(16, 16)] * 8
    assert result.scores == sorted(result.scores, reverse=True)
    text = tiny_model.clip_encoder.encode_text(["a red circle"])
    decoded = torch.cat([tiny_model.vqgan.decode(row[None]) for row in result.tokens])
    cosines = tiny_model.clip_encoder.encode_image(decoded) @ text[0]
    assert torch.allclose(cosines, torch.tensor(result.scores), atol=1e-6)
    assert [image.tobytes() for image in result.images] == [image.tobytes() for image in to_pil(decoded)]
    assert to_tensor(result.images).shape == (8, 3, 16, 16)


@pytest.mark.parametrize("candidates", [1, 6])
def test_a_likelihood_weight_adds_the_mean_log_likelihood_of_the_tokens(
    tiny_model: ClipGen, monkeypatch: pytest.MonkeyPatch, candidates: int
) -> None:
    settings = {"candidates": candidates, "num_outputs": candidates, "seed": 5, "guidance": 2, "temperature": 0.5}
    plain = tiny_model.generate("a star", **settings)
    config = replace(tiny_model.bridge.config, likelihood_weight=0.5)
    monkeypatch.setattr(tiny_model.bridge, "config", config)
    ranked = tiny_model.generate("a star", **settings)
    assert ranked.scores == sorted(ranked.scores, reverse=True)
    cosines = {tuple(tokens.tolist()): score for tokens, score in zip(plain.tokens, plain.scores, strict=True)}
    assert {tuple(tokens.tolist()) for tokens in ranked.tokens} == set(cosines)
    embedding = tiny_model.embed_prompt("a star")
    for tokens, score in zip(ranked.tokens, ranked.scores, strict=True):
        logs = tiny_model.gpt(embedding, tokens[None, :-1])[0].log_softmax(dim=1).gather(1, tokens[:, None])
        assert score == pytest.approx(cosines[tuple(tokens.tolist())] + 0.5 * float(logs.mean()), abs=1e-4)


def test_scores_are_cosines_with_the_shifted_embedding(tiny_model: ClipGen, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = Bridge(16, BridgeConfig(mean_shift=1.0))
    bridge.image_mean.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(tiny_model, "bridge", bridge)
    result = tiny_model.generate("a red circle", candidates=8, num_outputs=8, seed=1)
    expected = bridge(tiny_model.clip_encoder.encode_text(["a red circle"]))
    decoded = torch.cat([tiny_model.vqgan.decode(row[None]) for row in result.tokens])
    cosines = tiny_model.clip_encoder.encode_image(decoded) @ expected[0]
    assert torch.allclose(cosines, torch.tensor(result.scores), atol=1e-6)


def test_the_best_outputs_are_chosen_from_all_candidates(tiny_model: ClipGen) -> None:
    every = tiny_model.generate("a red circle", candidates=20, num_outputs=20, seed=1)
    best = tiny_model.generate("a red circle", candidates=20, num_outputs=3, seed=1)
    assert best.scores == every.scores[:3]
    assert torch.equal(best.tokens, every.tokens[:3])


def test_the_first_n_candidates_do_not_depend_on_their_number(tiny_model: ClipGen) -> None:
    def first(count: int, **settings: float) -> list[tuple[bytes, float]]:
        result = tiny_model.generate("a red circle", count, count, seed=9, clip_rerank=False, **settings)
        return [(image.tobytes(), score) for image, score in zip(result.images, result.scores, strict=True)]

    for settings in ({}, {"guidance": 2.0, "top_p": 0.9, "top_k": 20, "temperature": 0.9}):
        many = first(70, **settings)  # more than one chunk
        assert len(set(many)) > 60
        for count in (1, 3, 16, 17, 65):
            assert first(count, **settings) == many[:count]


def test_images_and_scores_do_not_depend_on_other_requests(
    tiny_model: ClipGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[int] = []  # how many in each call of decode
    decode = tiny_model.decode

    def watched(tokens: torch.Tensor, embeddings: torch.Tensor, *more: object) -> list[tuple[Image.Image, float]]:
        prompts.append(len(embeddings.unique(dim=0)))
        return decode(tokens, embeddings, *more)

    monkeypatch.setattr(tiny_model, "decode", watched)

    def drawn(number: int) -> list[tuple[bytes, float]]:
        count = 1 + number % 5
        result = tiny_model.generate(f"a red circle, {number} times", count, count, seed=number, clip_rerank=False)
        return [(image.tobytes(), score) for image, score in zip(result.images, result.scores, strict=True)]

    alone = [drawn(number) for number in range(10)]
    assert max(prompts) == 1
    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(drawn, range(10))) == alone
    assert max(prompts) > 1


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=FLOAT16)])
def test_logits_of_a_row_do_not_depend_on_the_rest_of_the_batch(dtype: str) -> None:
    """On older processors matrix products round differently for another number of rows; batches avoid such numbers.

    MKL_CBWR as the scripts and cog.yaml set it: by default MKL's rounding depends on where in memory numbers lie.
    """
    code = """
import sys
import torch
from clip_gen.config import GPTConfig
from clip_gen.networks.gpt import GPT
from clip_gen.sampling import batch_sizes, sampler
torch.manual_seed(0)
gpt = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=8, codebook_size=512, embed_dim=128)).eval()
gpt.cast_for_inference(getattr(torch, sys.argv[1]))
seen = []
step = gpt.step
gpt.step = lambda *given: seen.append(step(*given)) or seen[-1]
most = batch_sizes.max_candidates(gpt)
uniforms = sampler.candidate_uniforms(0, range(most), 8)
embedding = torch.nn.functional.normalize(torch.randn(1, 128), dim=1)
for guidance in (1.0, 2.0):
    seen.clear()
    sampling = sampler.Sampling(guidance=guidance)
    for n in (most, 20, 16, 3, 2):
        n = min(n, most)
        tokens = sampler.sample_tokens(gpt, embedding.expand(n, -1), uniforms[:n], sampling)
        assert all(torch.equal(a[:n], b[:n]) for a, b in zip(seen[:8], seen[-8:])), (guidance, n)
        if guidance != 1:
            assert all(torch.equal(a[most : most + n], b[n : 2 * n]) for a, b in zip(seen[:8], seen[-8:])), n
    alone = sampler.sample_tokens(gpt, embedding, uniforms[:1], sampling)  # in windows of several positions
    assert torch.equal(alone, tokens[:1]), guidance
"""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AUTO"}
    subprocess.run([sys.executable, "-c", code, dtype], check=True, env=environment)


def test_without_a_seed_a_random_one_is_used_and_reported(tiny_model: ClipGen) -> None:
    drawn = tiny_model.generate("a red circle", candidates=2, num_outputs=2)
    again = tiny_model.generate("a red circle", candidates=2, num_outputs=2, seed=drawn.seed)
    assert torch.equal(drawn.tokens, again.tokens)
    assert tiny_model.generate("a red circle", candidates=1, num_outputs=1).seed != drawn.seed


def test_without_reranking_the_first_candidates_are_returned_in_order(tiny_model: ClipGen) -> None:
    plain = tiny_model.generate("a red circle", candidates=8, num_outputs=8, seed=1, clip_rerank=False)
    ranked = tiny_model.generate("a red circle", candidates=8, num_outputs=8, seed=1)
    assert sorted(plain.scores, reverse=True) == ranked.scores
    assert tiny_model.generate("a", candidates=9, num_outputs=2, clip_rerank=False).candidates == 2
    # The number of candidates to choose from has no effect then.
    assert tiny_model.generate("a", candidates=1, num_outputs=2, clip_rerank=False).candidates == 2
    assert plain.scores != ranked.scores


def test_generate_works_in_inference_mode(tiny_model: ClipGen) -> None:
    plain = tiny_model.generate("a red circle", candidates=3, num_outputs=3, seed=1)
    with torch.inference_mode():
        result = tiny_model.generate("a red circle", candidates=3, num_outputs=3, seed=1)
    assert torch.equal(plain.tokens, result.tokens)
    assert [a.tobytes() for a in plain.images] == [b.tobytes() for b in result.images]


def test_generate_does_not_change_torchs_global_state(tiny_model: ClipGen) -> None:
    state = torch.get_rng_state()
    tiny_model.generate("a red circle", candidates=1, num_outputs=1, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": ""}, "there is neither a prompt nor an image; say what to draw, .* or give a picture as image"),
        ({"prompt": "a star | ?"}, r"prompt is '\?', without a letter, a digit or an emoji; say what to draw"),
        ({"negative_prompt": " "}, "negative_prompt is ' ', without a letter.*; say what the pictures should not show"),
        ({"negative_prompt": "a: b | c"}, "negative_prompt has the part 'a: b', whose weight is 'b'"),
        ({"image_weight": 1.5}, "image_weight is 1.5; give a number, 0 to 1"),
        ({"image": "nowhere.png"}, r"image is 'nowhere\.png', which cannot be read \(No such file"),
        ({"image": __file__}, "image cannot be used: a text file; give a picture, such as a JPEG or PNG file"),
        ({"prompt": " \n"}, "say what to draw"),
        ({"prompt": "\u200b\x07\u3164 ...!\ufffd"}, "without a letter, a digit or an emoji; say what to draw"),
        ({"prompt": 5}, "prompt is 5; say what to draw"),
        ({"prompt": "caf\udce9"}, r"prompt is 'caf\\udce9', which is not UTF-8 text; use a terminal or file in UTF-8"),
        ({"candidates": "16"}, "candidates is '16'; give a whole number"),
        ({"candidates": True}, "candidates is True; give a whole number"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"candidates": 0}, "candidates is 0; give a whole number, 1 to 256"),
        ({"candidates": 257}, "candidates is 257"),
        ({"num_outputs": 0}, "num_outputs is 0; give a whole number, 1 to 256"),
        ({"num_outputs": 257, "clip_rerank": False}, "num_outputs is 257; give a whole number, 1 to 256"),
        ({"num_outputs": None}, "num_outputs is None; give a whole number, 1 to 256"),
        ({"num_outputs": 5, "candidates": 4}, "num_outputs is 5, more than the 4 candidates; ask for 4 or fewer"),
        ({"seed": -1}, "seed is -1; give a whole number, 0 to 2147483647"),
        ({"seed": 2**31}, "seed is 2147483648"),
        ({"top_p": 2.0}, "top_p is 2.0; give"),
        ({"top_p": None}, "top_p is None; give a number, 0 to 1"),
        ({"temperature": "1"}, "temperature is '1'; give a number, 0 to 10"),
        ({"clip_rerank": "no"}, "clip_rerank is 'no'; give True or False"),
        ({"num_outputs": 0, "clip_rerank": False}, "num_outputs is 0; give"),
        ({"temperature": -1.0}, "temperature is -1.0; give"),
        ({"top_k": 2.0}, "top_k is 2.0; give"),
    ],
)
def test_an_error_names_the_wrong_value_and_the_remedy(
    tiny_model: ClipGen, values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_model.generate(**{"prompt": "a red circle", **values})


@pytest.mark.parametrize("prompt", ["赤い円", "7", "😀", "❤️", "♥", "#️⃣", "↔", "é", "a\u200b"])
def test_a_prompt_needs_a_letter_a_digit_or_an_emoji(prompt: str) -> None:
    check_prompt(prompt)


def test_numpy_numbers_give_the_same_images(tiny_model: ClipGen) -> None:
    plain = tiny_model.generate("a star", candidates=3, num_outputs=2, seed=5, top_k=4)
    whole = {"candidates": np.int64(3), "num_outputs": np.int32(2), "seed": np.uint8(5), "top_k": np.int64(4)}
    assert torch.equal(tiny_model.generate("a star", **whole).tokens, plain.tokens)
    half = [{"temperature": one, "top_p": one, "guidance": one} for one in (0.5, Fraction(1, 2), np.float32(0.5))]
    first, *others = (tiny_model.generate("a star", **whole, **settings).tokens for settings in half)
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 1, "clip_rerank": False}])
def test_greedy_settings_draw_one_candidate_with_a_warning(
    tiny_model: ClipGen, settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    result = tiny_model.generate("a red circle", candidates=8, num_outputs=4, seed=1, **settings)
    assert (len(result.images), len(result.scores), len(result.tokens), result.candidates) == (1, 1, 1, 1)
    (name, value), *_ = settings.items()
    sentence = f"{name} is {value}: all candidates would be the same picture, so one is drawn and returned"
    assert result.warnings == [sentence]
    assert sentence in caplog.text


def test_a_top_k_without_effect_gives_a_warning(tiny_model: ClipGen) -> None:
    warnings = tiny_model.generate("a star", candidates=1, num_outputs=1, top_k=32).warnings
    assert warnings == ["top_k is 32, which does nothing: this model has no more tokens"]
    assert tiny_model.generate("a star", candidates=1, num_outputs=1, top_k=31).warnings == []


def test_a_truncated_prompt_gives_a_warning(tiny_model: ClipGen, caplog: pytest.LogCaptureFixture) -> None:
    result = tiny_model.generate(f"{'red ' * 14}blue star", candidates=1, num_outputs=1)
    (sentence,) = result.warnings
    assert sentence == "the prompt is longer than this model's CLIP reads; its end is left out: 'blue star'"
    assert caplog.messages == [sentence]
    assert tiny_model.generate("a star", candidates=1, num_outputs=1).warnings == []


@pytest.mark.parametrize("vocabulary", ["", "circle and\x1b square; in red\n\nShapes: circle\n"])
def test_unknown_words_give_a_warning_with_what_the_model_knows(
    vocabulary: str, caplog: pytest.LogCaptureFixture
) -> None:
    networks = replace(tiny_networks(), texts={"vocabulary.txt": vocabulary} if vocabulary else {})
    numbers = networks.clip.tokenize.bpe.encoder
    networks.clip.clip.token_embedding.weight[[numbers["zebra</w>"], numbers["purple</w>"]]] = 0
    model = ClipGen(networks, torch.device("cpu"))
    known = "; it knows circle and square; in red (vocabulary.txt lists all words)" if vocabulary else ""
    result = model.generate("a purple zebra on a zebra", candidates=1, num_outputs=1)
    assert result.warnings == caplog.messages == [f"this model does not know 'purple', 'zebra'{known}"]
    assert model.generate("a cat", candidates=1, num_outputs=1).warnings == []


def test_an_emoji_draws_the_pictures_of_its_name(tiny_model: ClipGen) -> None:
    emoji, name = (tiny_model.generate(prompt, 2, 2, seed=0) for prompt in ("a ⭐ on 🟥", "a star on red square"))
    assert torch.equal(emoji.tokens, name.tokens)
    assert emoji.scores == name.scores


def test_scores_of_nan_are_an_error() -> None:
    networks = tiny_networks()
    networks.clip.clip.text_projection.fill_(torch.nan)
    model = ClipGen(networks, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the scores are \[nan, .*damaged"):
        model.generate("a red circle", candidates=1, num_outputs=1)


def test_should_stop_is_called_before_every_token_and_decoding(tiny_model: ClipGen) -> None:
    asked = []

    def never() -> bool:
        asked.append(True)
        return False

    tiny_model.generate("a red circle", candidates=5, num_outputs=1, should_stop=never)
    assert len(asked) >= 16 + 2  # before every token, the first four pictures and the fifth
    for moment in (0, 10, 17):
        left = iter([False] * moment + [True])
        with pytest.raises(Stopped):
            tiny_model.generate("a red circle", candidates=5, num_outputs=1, should_stop=lambda: next(left))  # noqa: B023


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match='device is "tpu"; give'):
        choose_device("tpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_the_transformers_matrices_have_the_requested_dtype(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def types(dtype: str | None = None) -> set[torch.dtype]:
        gpt = ClipGen.load(tiny_model_folder, "cpu", dtype).gpt
        assert gpt.head.weight.dtype == gpt.blocks[0].ln_1.weight.dtype == torch.float32
        assert gpt.new_cache(torch.zeros(1, gpt.config.n_embd)).keys.dtype == gpt.blocks[1].mlp.fc.weight.dtype
        return {block.attn.qkv.weight.dtype for block in gpt.blocks}

    assert types("bfloat16") == {torch.bfloat16}
    assert types("float32") == {torch.float32}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert types() == {torch.bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr("clip_gen.hardware.supports_float16", lambda: False)
    assert types() == {torch.float32}
    monkeypatch.setenv("CLIP_GEN_DTYPE", "bfloat16")
    assert types() == {torch.bfloat16}
    with pytest.raises(ValueError, match='dtype is "int4"; give "auto", "float32", "bfloat16" or "float16"'):
        types("int4")


@pytest.mark.parametrize("patch", [1, 4])
def test_whole_images_are_decoded_channels_last(tmp_path: Path, patch: int) -> None:
    vqgan = replace(TINY.vqgan, patch=patch, ch_mult=(1, 1, 1) if patch == 1 else (1,))
    save_networks(build(replace(TINY, vqgan=vqgan)), tmp_path / "model", {})
    plain = load_networks(tmp_path / "model").vqgan
    loaded = ClipGen.load(tmp_path / "model", "cpu").vqgan
    weight = loaded.decoder.mid.block_1.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == (patch == 1)
    tokens = torch.randint(0, vqgan.codebook_size, (2, vqgan.grid**2), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(loaded.decode(tokens), plain.decode(tokens), atol=1e-5)


@pytest.mark.parametrize("patch", [1, 4])
def test_whole_images_are_decoded_in_bfloat16_by_a_cpu_that_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch: int
) -> None:
    vqgan = replace(TINY.vqgan, patch=patch, ch_mult=(1, 1, 1) if patch == 1 else (1,))
    torch.manual_seed(0)
    save_networks(build(replace(TINY, vqgan=vqgan)), tmp_path / "model", {})
    tokens = torch.randint(0, vqgan.codebook_size, (1, vqgan.grid**2), generator=torch.Generator().manual_seed(0))

    def images(has_bfloat16: bool, dtype: str | None = None) -> torch.Tensor:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16})
        return ClipGen.load(tmp_path / "model", "cpu", dtype).decode_and_score(tokens, torch.ones(1, 16))[0]

    exact, rounded = images(False), images(True)
    assert rounded.dtype == torch.float32
    assert torch.equal(images(True, "float32"), exact)
    assert torch.equal(rounded, exact) == (patch == 4)
    assert (rounded - exact).abs().mean() < 0.02  # of pixels from -1 to 1


def test_bfloat16_logits_are_close_to_float32(tiny_model_folder: Path) -> None:
    exact, bfloat16 = (ClipGen.load(tiny_model_folder, "cpu", dtype).gpt for dtype in ("float32", "bfloat16"))
    embedding = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    tokens = torch.randint(0, 32, (4, 15), generator=torch.Generator().manual_seed(1))
    difference = (exact(embedding, tokens) - bfloat16(embedding, tokens)).abs()
    assert 0 < difference.max() < 0.02 * exact(embedding, tokens).std() + 0.01


@pytest.mark.parametrize("form", ["model folder", "training's folder", "tar alone in it", "tar", "zip", "url"])
def test_a_model_is_loaded_from_a_folder_tar_zip_or_url(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("CLIP_GEN_CACHE", str(tmp_path / "cache"))
    trained = tmp_path / "trained"
    shutil.copytree(tiny_model_folder, trained / "model")
    pack(trained / "model", trained / "weights.tar")
    shutil.make_archive(str(tmp_path / "model"), "zip", trained, "model")
    if form == "tar alone in it":
        shutil.rmtree(trained / "model")
    names = {"model folder": trained / "model", "tar": trained / "weights.tar", "zip": tmp_path / "model.zip"}
    with web_server(trained) as address:
        model = ClipGen.load(f"{address}/weights.tar" if form == "url" else names.get(form, trained), "cpu")
    assert len(model.generate("a star", 1, 1, seed=0).images) == 1


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ("", "the name of the weights is empty; give a model folder, a"),
        (None, "the name of the weights is None; give a model folder"),
        (5, "the name of the weights is 5; give a model"),
    ],
)
def test_a_wrong_name_of_weights_is_an_error(weights: object, sentence: str) -> None:
    with pytest.raises(ModelFolderError, match=sentence):
        ClipGen.load(weights)
