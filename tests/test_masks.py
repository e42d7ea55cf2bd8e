"""Masks: a part of a picture is redrawn, and the rest of it stays."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_networks
from PIL import Image

from clip_gen import ClipGen, Generation
from clip_gen.__main__ import main
from clip_gen.images import resized_square, to_tensor
from clip_gen.sampling.inpainting import Inpainting
from clip_gen.sampling.sampler import Batch, Sampling, candidate_uniforms
from clip_gen.validation import check_request
from predict import INPUTS, Predictor

FEW = {"candidates": 4, "num_outputs": 4, "seed": 1}
TOKENS = 16  # of the tiny model: 4 x 4 squares of 4 x 4 pixels


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A file with a picture wider than high."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Of the picture's shape, half its size. At the model's size, 16 x 16, it is white in columns 4 to 9, rows 4 to 11.

    So in the squares of tokens 5, 6, 9 and 10.
    """
    painted = Image.new("L", (30, 20))
    painted.paste(255, (10, 5, 17, 15))
    painted.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def square_mask(left: int, top: int, right: int, bottom: int, side: int = 16) -> Image.Image:
    mask = Image.new("L", (side, side))
    mask.paste(255, (left, top, right, bottom))
    return mask


def local_model() -> ClipGen:
    networks = tiny_networks(config=replace(TINY, vqgan=replace(TINY.vqgan, local=True, ch=64)))
    return ClipGen(networks, torch.device("cpu"))


def same(first: Generation, second: Generation) -> bool:
    alike = [one.tobytes() for one in first.images] == [one.tobytes() for one in second.images]
    return alike and first.scores == second.scores


def test_pixels_outside_the_mask_are_those_of_the_resized_picture(
    tiny_model: ClipGen, picture: Path, mask: Path
) -> None:
    result = tiny_model.generate("a star", init_image=picture, mask=mask, **FEW)
    expected = np.asarray(resized_square(Image.open(picture), 16))
    white = np.asarray(resized_square(Image.open(mask), 16)) >= 128
    assert white.sum() == 6 * 8
    for image in result.images:
        assert np.array_equal(np.asarray(image)[~white], expected[~white])
        assert (np.asarray(image) != expected)[white].any(axis=1).mean() > 0.5
    assert len({image.tobytes() for image in result.images}) == 4


def test_only_tokens_with_masked_pixels_are_sampled_by_a_local_encoder(picture: Path, mask: Path) -> None:
    model = local_model()
    result = model.generate("a star", init_image=picture, mask=mask, **FEW)
    own = model.vqgan.encode(to_tensor([resized_square(Image.open(picture), 16)]))[0]
    redrawn = torch.zeros(TOKENS, dtype=torch.bool)
    redrawn[[5, 6, 9, 10]] = True
    assert torch.equal(result.tokens[:, ~redrawn], own[~redrawn].expand(4, -1))
    assert (result.tokens[:, redrawn] != own[redrawn]).any(dim=1).all()


def test_other_encoders_also_sample_the_tokens_beside_the_mask(tiny_model: ClipGen, picture: Path) -> None:
    result = tiny_model.generate("a star", init_image=resized_square(Image.open(picture), 16),
                                 mask=square_mask(15, 15, 16, 16), **FEW)  # fmt: skip
    own = tiny_model.vqgan.encode(to_tensor([resized_square(Image.open(picture), 16)]))[0]
    changed = (result.tokens != own).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [10, 11, 14, 15]


def test_a_white_mask_draws_the_tokens_of_the_plain_prompt(tiny_model: ClipGen, picture: Path) -> None:
    white = Image.new("L", (60, 40), 255)
    result = tiny_model.generate("a star", init_image=picture, mask=white, **FEW)
    assert torch.equal(result.tokens, tiny_model.generate("a star", **FEW).tokens)


def test_the_seam_lies_inside_the_mask_and_rises_over_a_64th_of_the_side() -> None:
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[32:, 32:96] = True  # to the lower edge, where there is no seam
    opacity = Inpainting(torch.zeros(3, 128, 128), mask, "").opacity[0]
    assert torch.allclose(opacity[64, 30:37], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1, 1]))
    assert torch.allclose(opacity[30:37, 64], torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1, 1]))
    assert torch.equal(opacity > 0, mask)
    assert (opacity[127, 34:94] == 1).all()


def test_scores_add_the_likelihood_of_kept_tokens_that_follow_to_the_cosine_of_the_pasted_picture(
    tiny_model: ClipGen, picture: Path
) -> None:
    square, mask = resized_square(Image.open(picture), 16), square_mask(0, 6, 4, 7)
    result = tiny_model.generate("a star", init_image=square, mask=mask, guidance=2, top_k=5, **FEW)
    redrawn = [0, 1, 4, 5, 8, 9]
    embedding = tiny_model.embed_prompt("a star")
    for image, tokens, score in zip(result.images, result.tokens, result.scores, strict=True):
        logits = tiny_model.gpt(embedding, tokens[None, :-1])[0]
        likelihoods = logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
        follow = [t for t in range(TOKENS) if t not in redrawn]
        cosine = float((tiny_model.clip_encoder.encode_image(to_tensor([image])) * embedding).sum())
        assert score == pytest.approx(cosine + float(likelihoods[follow].mean()), abs=0.01)  # pixels are rounded
    assert result.scores == sorted(result.scores, reverse=True)


def test_a_candidate_depends_on_its_seed_and_number_alone(tiny_model: ClipGen, picture: Path, mask: Path) -> None:
    asked = {"init_image": picture, "mask": mask, "seed": 5, "clip_rerank": False}
    alone = tiny_model.generate("a star", num_outputs=2, **asked)
    with ThreadPoolExecutor(3) as pool:  # in common batches, also with whole pictures
        many = pool.submit(tiny_model.generate, "a star", num_outputs=20, **asked)
        plain = pool.submit(tiny_model.generate, "a star", num_outputs=4, clip_rerank=False, seed=5)
        other = pool.submit(tiny_model.generate, "a heart", init_image=picture, mask=mask, num_outputs=3, seed=9)
    assert [image.tobytes() for image in many.result().images[:2]] == [image.tobytes() for image in alone.images]
    assert many.result().scores[:2] == alone.scores
    assert same(plain.result(), tiny_model.generate("a star", num_outputs=4, clip_rerank=False, seed=5))
    assert same(other.result(), tiny_model.generate("a heart", init_image=picture, mask=mask, num_outputs=3, seed=9))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("neighbour_context", [False, True])
def test_both_kinds_of_steps_keep_tokens_and_rate_them(recorded: bool, neighbour_context: bool) -> None:
    config = replace(TINY.gpt, rotary=True, neighbour_context=neighbour_context)
    gpt = tiny_networks(config=replace(TINY, gpt=config)).gpt
    for parameter in gpt.parameters():
        parameter.normal_(std=0.3)  # so that tokens depend on earlier ones
    embedding, uniforms = torch.nn.functional.normalize(torch.ones(3, 16), dim=1), candidate_uniforms(0, range(3), 16)
    kept = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    kept[0], kept[1, 4:7], kept[2, 12:] = -1, -1, -1
    batch = Batch(gpt, embedding, uniforms, Sampling(), kept=kept, recorded=recorded)
    plain = Batch(gpt, embedding, uniforms, Sampling(), recorded=recorded)
    while not batch.done:
        batch.step()
        plain.step()
    assert torch.equal(batch.tokens[0], plain.tokens[0])
    assert torch.equal(batch.tokens[kept >= 0], kept[kept >= 0])
    logits = gpt(embedding, batch.tokens[:, :-1])
    likelihoods = logits.log_softmax(dim=2).gather(2, batch.tokens[..., None])[..., 0]
    expected = [0, float(likelihoods[1, 7:].mean()), 0]
    assert batch.likelihoods.of_kept.tolist() == pytest.approx(expected, abs=1e-4)


def test_grey_counts_as_white_from_half_on(tiny_model: ClipGen, picture: Path) -> None:
    square, levels = resized_square(Image.open(picture), 16), np.full((16, 16), 127, np.uint8)
    levels[:, 4:9] = 128
    half = tiny_model.generate("a star", init_image=square, mask=Image.fromarray(levels), **FEW)
    assert same(half, tiny_model.generate("a star", init_image=square, mask=square_mask(4, 0, 9, 16), **FEW))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init_image": None}, "mask is given without init_image; give the picture to redraw as init_image"),
        ({"mask": None}, "init_image is given without mask; give a picture that is white where to redraw as mask"),
        ({"prompt": ""}, "there is neither a prompt nor an image"),
        ({"mask": Image.new("L", (40, 60), 255)}, "mask is 40 x 60 pixels, but init_image is 60 x 40; give a mask of"),
        ({"mask": Image.new("L", (60, 40))}, "mask has no white in its central square at 16 x 16 pixels; paint white"),
        ({"mask": "nowhere.png"}, "mask is 'nowhere.png', which cannot be read"),
        ({"init_image": __file__}, "init_image cannot be used: "),
    ],
)
def test_what_cannot_be_used_is_named(
    tiny_model: ClipGen, picture: Path, mask: Path, changes: dict[str, object], sentence: str
) -> None:
    given = {"prompt": "a star", "init_image": picture, "mask": mask} | changes
    with pytest.raises(ValueError, match=sentence.replace("(", "\\(")):
        tiny_model.generate(**given, **FEW)


def test_a_mask_without_a_picture_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="mask is given without init_image"):
        check_request("a star", 4, 4, 1, True, mask="mask.png", temperature=1, top_k=0, top_p=1, guidance=1)


def test_the_notes_and_the_log_say_how_the_picture_was_resized(
    tiny_model: ClipGen, picture: Path, mask: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "clip_gen")
    result = tiny_model.generate("a star", init_image=picture, mask=mask, **FEW)
    assert result.notes == ["init_image is 60 x 40 pixels: its central 40 x 40 become 16 x 16"]
    assert result.notes[0] in caplog.messages
    assert tiny_model.generate("a star", **FEW).notes == []


@pytest.fixture
def words(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    few = ["--candidates=4", "--num-outputs=2", "--seed=1"]
    return ["generate", "--model", str(tiny_model_folder), "--out", str(tmp_path / "out"), *few]


def test_generate_writes_what_python_draws_and_info_how_to_repeat_it(
    words: list[str], tiny_model: ClipGen, picture: Path, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, f"--init-image={picture}", f"--mask={mask}", "a star"]) == 0
    written = tmp_path / "out" / "1.png"
    expected = tiny_model.generate("a star", init_image=picture, mask=mask, **FEW | {"num_outputs": 2})
    assert Image.open(written).tobytes() == expected.images[1].tobytes()
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in
              (("init_image", picture), ("mask", mask))}  # fmt: skip
    text = Image.open(written).text
    assert {name: text[f"{name}_sha256"] for name in hashes} == hashes
    assert str(tmp_path).encode() not in written.read_bytes()
    capsys.readouterr()
    assert main(["info", str(written)]) == 0
    command, _, *lines = capsys.readouterr().out.splitlines()
    assert {"--init-image=INIT_IMAGE", "--mask=MASK"} <= set(shlex.split(command))
    assert lines[0] == f"init_image: sha256 {hashes['init_image']}; put its file in place of INIT_IMAGE"
    assert lines[1] == f"mask: sha256 {hashes['mask']}; put its file in place of MASK"
    absent = [*words, f"--init-image={picture}", "--mask=absent.png", "--overwrite", "--model=nowhere", "a star"]
    assert main(absent) == 1
    assert "mask is 'absent.png', which cannot be read" in capsys.readouterr().err


def test_lines_of_a_prompts_file_have_masks_and_are_drawn_again_when_one_changes(
    words: list[str], picture: Path, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "a star", "init_image": str(picture), "mask": str(mask)}, {"prompt": "a star"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [*words, "--prompts-file", str(tmp_path / "lines.jsonl"), "--overwrite"]
    assert main(command) == 0
    first, plain = ((tmp_path / "out" / f"000{line}.0.png").read_bytes() for line in (1, 2))
    Image.new("L", (60, 40), 255).save(mask)
    capsys.readouterr()
    assert main(command) == 0
    assert "1 of 2 prompts were drawn before" in capsys.readouterr().out
    assert (tmp_path / "out" / "0001.0.png").read_bytes() != first
    assert (tmp_path / "out" / "0002.0.png").read_bytes() == plain


def test_cog_draws_what_python_draws(
    tiny_model: ClipGen, tiny_model_folder: Path, picture: Path, mask: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor()
    asyncio.run(predictor.setup(str(tiny_model_folder)))
    asked = {"prompt": "a star", "num_outputs": 2, "candidates": 4, "seed": 1}
    inputs = {name: field.info.default for name, field in INPUTS.items()} | asked
    paths = asyncio.run(predictor.run(**inputs | {"init_image": picture, "mask": mask}))
    expected = tiny_model.generate(**asked, init_image=picture, mask=mask)
    assert [Image.open(path).tobytes() for path in paths] == [image.tobytes() for image in expected.images]
    assert "init_image is 60 x 40 pixels: its central 40 x 40 become 16 x 16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mask is given without init_image"):
        asyncio.run(predictor.run(**inputs | {"mask": mask}))
