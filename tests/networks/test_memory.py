"""memory.py: candidates are drawn from embeddings of pictures near a text's embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_networks
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.config import BridgeConfig
from clip_gen.networks.bridge import Bridge
from clip_gen.networks.memory import Memory, nearest_before
from clip_gen.weights.model_folder import load_base, save_networks

THINGS, ARTISTS = 6, 4


def pictures() -> Tensor:
    """Embeddings of things, each drawn by some artists, (THINGS · ARTISTS, 16)."""
    generator = torch.Generator().manual_seed(0)
    things = F.normalize(torch.randn(THINGS, 1, 16, generator=generator), dim=2)
    artists = F.normalize(torch.randn(THINGS, ARTISTS, 16, generator=generator), dim=2)
    return F.normalize(things + 0.3 * artists, dim=2).flatten(0, 1)


def filled(embeddings: Tensor, rows: int, axes: int = 16) -> Memory:
    memory = Memory(16, BridgeConfig(memory=rows, memory_axes=axes))
    memory.fill(embeddings)
    return memory


def test_candidates_take_the_embeddings_of_different_pictures_that_fit() -> None:
    embeddings = pictures()
    memory, taken = filled(embeddings, len(embeddings)), []
    for thing in range(THINGS):
        fitting = embeddings[thing * ARTISTS : (thing + 1) * ARTISTS]
        text = F.normalize(fitting.mean(dim=0, keepdim=True), dim=1)
        cosine = memory.near(text, torch.linspace(0, 0.9, 10)[None])[0] @ embeddings.T
        found = cosine.argmax(dim=1)[cosine.amax(dim=1) > 0.999]  # a byte for each number is nearly exact
        assert (found // ARTISTS == thing).all()
        taken += found.tolist()
    assert len(taken) >= 7 * THINGS
    assert len(set(taken)) >= 2 * THINGS


def test_a_text_that_no_picture_shows_gets_the_style_of_pictures_near_it() -> None:
    """Things on grounds in three styles, as emoji are; the last ground has no picture of the last thing."""
    generator = torch.Generator().manual_seed(0)
    things, grounds, styles = (F.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (8, 8, 3))
    shown = (things[:, None, None] + grounds[:, None] + 0.5 * styles).flatten(0, 1)  # (64, 3, 64)
    pictures = F.normalize(shown, dim=2)
    texts = F.normalize(shown.mean(dim=1), dim=1)
    memory = Memory(64, BridgeConfig(memory=63 * 3, memory_axes=32))
    memory.fill(pictures[:-1].flatten(0, 1))
    memory.learn_unsaid(pictures[:-1].flatten(0, 1), texts[:-1].repeat_interleave(3, dim=0))
    drawn = memory.near(texts, torch.rand(64, 20, generator=generator))
    cosine = drawn @ pictures.transpose(1, 2)  # (64, 20, 3): with the pictures that fit
    assert (cosine[:-1].amax(dim=2) > 0.99).all()
    assert (cosine[-1].amax(dim=1) > 0.98).all()
    assert (texts[-1] @ pictures[-1].T).max() < 0.97
    assert len(cosine[-1].argmax(dim=1).unique()) > 1


def test_a_picture_that_reaches_as_far_as_a_text_but_shows_something_else_is_not_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = 4 * F.normalize(torch.ones(64), dim=0)
    unseen, beside, *others = F.normalize(torch.randn(40, 64, generator=generator), dim=1)
    shown = torch.stack([*others, 0.97 * unseen + 0.6 * beside])
    memory = Memory(64, BridgeConfig(memory=len(shown), memory_axes=39))
    memory.fill(F.normalize(centre + shown, dim=1))
    text = F.normalize(centre + unseen, dim=0)[None]
    near = memory.near(text, torch.tensor([[0.1, 0.9]]))[0] - memory.mean
    assert F.cosine_similarity(near, text - memory.mean).min() > 0.99


def test_a_candidate_takes_the_same_embedding_whatever_the_number_of_candidates() -> None:
    memory, chances = (
        filled(pictures(), THINGS * ARTISTS),
        torch.rand(1, 20, generator=torch.Generator().manual_seed(1)),
    )
    text = F.normalize(torch.ones(1, 16), dim=1)
    many = memory.near(text, chances)
    assert torch.equal(memory.near(text, chances[:, :3]), many[:, :3])
    assert torch.equal(memory.near(text, chances[:, 7:8]), many[:, 7:8])


def test_a_chance_of_nearly_one_is_a_picture_too() -> None:
    assert (
        filled(pictures(), 3).near(F.normalize(torch.ones(1, 16), dim=1), torch.tensor([[0.9999999]])).isfinite().all()
    )


def test_copies_are_forgotten_first() -> None:
    embeddings = pictures()
    memory = filled(embeddings.repeat(5, 1), len(embeddings))
    remembered = F.normalize(memory.rows * memory.steps @ memory.axes + memory.mean, dim=1)
    assert ((embeddings @ remembered.T).amax(dim=1) > 0.999).all()


def test_the_nearest_before_is_that_of_all_pairs() -> None:
    places = torch.randn(4500, 5, generator=torch.Generator().manual_seed(2))
    directions = F.normalize(places, dim=1)
    earlier = torch.ones(4500, 4500, dtype=torch.bool).tril(-1)
    wanted = (directions @ directions.T).masked_fill(~earlier, -1.0).amax(dim=1)
    assert torch.allclose(nearest_before(places), wanted, atol=1e-6)


def test_too_few_embeddings_for_a_memory_are_an_error() -> None:
    with pytest.raises(ValueError, match="24 embeddings are too few for a memory of 25"):
        filled(pictures(), 25)


def test_without_a_memory_all_candidates_are_drawn_from_the_text() -> None:
    text = F.normalize(torch.ones(1, 16), dim=1)
    assert torch.equal(Bridge(16, BridgeConfig()).conditions(text, torch.rand(1, 3)), text.expand(3, -1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a memory."""
    networks = tiny_networks(config=replace(TINY, bridge=BridgeConfig(memory=24, memory_axes=8)))
    networks.bridge.memory.fill(pictures())
    texts = pictures().view(THINGS, ARTISTS, 16).mean(dim=1).repeat_interleave(ARTISTS, dim=0)
    networks.bridge.memory.learn_unsaid(pictures(), texts)
    path = tmp_path_factory.mktemp("models") / "remembers"
    save_networks(networks, path, training={})
    return path


def test_a_model_draws_texts_from_its_memory_and_pictures_from_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, taken = ClipGen.load(folder, "cpu"), []
    monkeypatch.setattr("clip_gen.networks.memory.SOFTNESS", 1.0)  # a random text is near to a single picture
    near = model.bridge.memory.near
    monkeypatch.setattr(model.bridge.memory, "near", lambda *inputs: taken.append(near(*inputs)) or taken[-1])
    many = model.generate("a red circle", candidates=8, num_outputs=8, seed=3, clip_rerank=False)
    assert len(taken[0][0].unique(dim=0)) > 1
    few = model.generate("a red circle", candidates=2, num_outputs=2, seed=3, clip_rerank=False)
    assert torch.equal(few.tokens, many.tokens[:2])
    picture = Image.new("RGB", (16, 16), "red")
    model.generate(image=picture, candidates=2, num_outputs=2, seed=3)
    model.generate("a red circle", image=picture, image_weight=1.0, candidates=2, num_outputs=2, seed=3)
    assert len(taken) == 2
    model.generate("a red circle", image=picture, candidates=2, num_outputs=2, seed=3)
    assert len(taken) == 3


def test_a_training_forgets_the_pictures_of_its_base(folder: Path) -> None:
    networks = load_base(folder)
    assert networks.bridge.memory is None
    assert networks.config.bridge.memory == networks.bridge.config.memory == 0
