"""Image prompts, weighted prompts and negative prompts, from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_networks
from PIL import Image

from clip_gen import ClipGen, Generation
from clip_gen.images import resized_square, to_tensor
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.mixing import slerp
from clip_gen.sampling.condition import open_picture
from clip_gen.training.datasets import PictureFiles

FEW = {"candidates": 4, "num_outputs": 4, "seed": 1}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A file with a picture wider than high."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def same(first: Generation, second: Generation) -> bool:
    alike = [one.tobytes() for one in first.images] == [one.tobytes() for one in second.images]
    return alike and first.scores == second.scores


def scores(model: ClipGen, result: Generation, direction: torch.Tensor) -> torch.Tensor:
    decoded = torch.cat([model.vqgan.decode(row[None]) for row in result.tokens])
    return (model.clip_encoder.encode_image(decoded) @ direction.T)[:, 0]


def test_an_image_conditions_the_transformer_and_the_ranking(tiny_model: ClipGen, picture: Path) -> None:
    result = tiny_model.generate(image=picture, **FEW)
    square = to_tensor([PictureFiles([picture], 16)[0]])  # as training sees it
    embedding = tiny_model.clip_encoder.encode_image(square)
    assert torch.allclose(scores(tiny_model, result, embedding), torch.tensor(result.scores), atol=1e-6)
    assert result.scores == sorted(result.scores, reverse=True)
    assert result.tokens.tolist() != tiny_model.generate("a star", **FEW).tokens.tolist()


def test_an_image_is_a_path_a_text_or_an_open_picture(tiny_model: ClipGen, picture: Path) -> None:
    results = [tiny_model.generate(image=one, **FEW) for one in (picture, str(picture), Image.open(picture))]
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_prompt_and_image_are_mixed_on_the_sphere(tiny_model: ClipGen, picture: Path) -> None:
    def mixed(weight: float) -> Generation:
        return tiny_model.generate("a star", image=picture, image_weight=weight, **FEW)

    assert same(mixed(0), tiny_model.generate("a star", **FEW))
    assert same(mixed(1), tiny_model.generate(image=picture, **FEW))
    result = mixed(0.3)
    image = tiny_model.clip_encoder.encode_image(to_tensor([resized_square(open_picture(picture), 16)]))
    direction = slerp(tiny_model.embed_prompt("a star"), image, 0.3)
    assert torch.allclose(scores(tiny_model, result, direction), torch.tensor(result.scores), atol=1e-6)


def test_an_open_picture_is_turned_upright_and_stays_as_it_was() -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.info["exif"] = exif.tobytes()
    opened = open_picture(picture)
    assert (opened.mode, opened.size) == ("RGB", (2, 4))
    assert (picture.mode, picture.size) == ("RGBA", (4, 2))


def test_a_weighted_prompt_mixes_the_shifted_embeddings_of_its_parts(
    tiny_model: ClipGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = Bridge(16, replace(TINY.bridge, mean_shift=1.0))
    bridge.image_mean.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(tiny_model, "bridge", bridge)
    one, other = (bridge(tiny_model.clip_encoder.encode_text([text])) for text in ("a star", "a circle"))
    expected = torch.nn.functional.normalize(3 * one + other, dim=-1)
    assert torch.allclose(tiny_model.embed_prompt("a star:3 | a circle"), expected, atol=1e-6)


def test_a_part_of_weight_zero_changes_no_bit(tiny_model: ClipGen) -> None:
    plain = tiny_model.generate("a star", **FEW)
    assert same(plain, tiny_model.generate("a star:0.5 | a circle:0", **FEW))
    assert same(plain, tiny_model.generate("a circle:0.0 | a star", **FEW))
    assert not same(plain, tiny_model.generate("a circle:0.1 | a star", **FEW))


def test_a_negative_prompt_counts_against_candidates_and_raises_guidance(
    tiny_model: ClipGen, caplog: pytest.LogCaptureFixture
) -> None:
    result = tiny_model.generate("a star", negative_prompt="red", **FEW)
    direction = tiny_model.embed_prompt("a star") - tiny_model.embed_prompt("red")
    assert torch.allclose(scores(tiny_model, result, direction), torch.tensor(result.scores), atol=1e-6)
    assert result.scores == sorted(result.scores, reverse=True)
    assert result.guidance == 3
    assert caplog.messages == ["guidance is 1, with which a negative prompt does little: it is 3 here"]
    caplog.clear()
    assert same(result, tiny_model.generate("a star", negative_prompt="red", guidance=3, **FEW))
    assert caplog.messages == []
    assert tiny_model.generate("a star", negative_prompt="red", guidance=2, **FEW).guidance == 2


def test_a_negative_prompt_makes_guidance_available_without_a_null_condition() -> None:
    networks = tiny_networks(config=replace(TINY, gpt=replace(TINY.gpt, null_condition=False)))
    model = ClipGen(networks, torch.device("cpu"))
    with pytest.raises(ValueError, match="leave guidance at 1, give a negative_prompt, or fine-tune"):
        model.generate("a star", guidance=3, **FEW)
    guided = model.generate("a star", negative_prompt="red:2 | blue", **FEW)
    assert guided.tokens.tolist() != model.generate("a star", **FEW).tokens.tolist()


def test_a_long_part_of_a_prompt_gives_a_warning(tiny_model: ClipGen) -> None:
    long = f"{'red ' * 14}blue star"
    result = tiny_model.generate(f"a star | {long}:2", negative_prompt=long, candidates=1, num_outputs=1)
    assert result.warnings[:2] == [
        "the prompt is longer than this model's CLIP reads; its end is left out: 'blue star'",
        "the negative prompt is longer than this model's CLIP reads; its end is left out: 'blue star'",
    ]
