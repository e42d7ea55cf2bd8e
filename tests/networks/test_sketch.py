"""networks/sketch.py: what is drawn and where, from the condition alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.networks.sketch import FEATURES, square_origins
from clip_gen.training.gpt_trainer import token_nats
from clip_gen.training.sketch_trainer import Sketching

CONFIG = replace(TINY.gpt, sketch_drawings=1, sketch_cells=2)  # on a grid of 4 x 4


def test_the_origin_of_a_square_lies_above_and_left_of_its_cells() -> None:
    origins = square_origins(4, 2)
    assert origins.shape == (16, 4)
    assert origins[0].tolist() == [0, 16, 16, 16]  # the others would begin outside the grid
    assert origins[5].tolist() == [5, 4, 1, 0]
    assert origins[4].tolist() == [4, 16, 0, 16]


def test_features_of_some_positions_are_those_of_all_of_them() -> None:
    torch.manual_seed(0)
    sketch, condition = GPT(CONFIG).sketch, torch.randn(3, CONFIG.n_embd)
    positions = torch.tensor([[0, 5], [7, 15], [1, 2]])
    every = sketch(condition)
    assert every.shape == (3, 16, FEATURES)
    some = every.gather(1, positions[..., None].expand(-1, -1, FEATURES))
    assert torch.allclose(sketch(condition, positions), some, atol=1e-5)


def test_a_drawing_is_learnt_once_for_all_its_places() -> None:
    """Of 8 drawings of 2 x 2 tokens at 49 places, a third of the pairs are never trained on."""
    torch.manual_seed(0)
    config = replace(CONFIG, n_embd=64, embed_dim=64, block_size=64)  # a grid of 8 x 8
    gpt = GPT(config).requires_grad_(True)
    drawing, place = torch.arange(392) // 49, torch.arange(392) % 49
    meanings = F.normalize(torch.randn(57, config.embed_dim), dim=1)
    embeddings = F.normalize(meanings[drawing] + meanings[8 + place], dim=1)
    tokens, patterns = torch.zeros(392, 64, dtype=torch.long), torch.randint(1, 32, (8, 4))
    for cell in range(4):
        rows, columns = place // 7 + cell // 2, place % 7 + cell % 2
        tokens[torch.arange(392), 8 * rows + columns] = patterns[drawing, cell]
    unseen = (drawing + place) % 3 == 0
    sketching, conditional = Sketching(gpt), torch.zeros(64, dtype=torch.bool)
    sketching.start_from(embeddings)
    optimizer = torch.optim.Adam(sketching.parameters(), 3e-3)
    seen = (~unseen).nonzero()[:, 0]
    for _ in range(150):
        chosen = seen[torch.randperm(len(seen))[:64]]
        loss = token_nats(sketching(embeddings[chosen], conditional), tokens[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = sketching(embeddings, torch.zeros(392, dtype=torch.bool)).argmax(dim=2) == tokens
    # By chance, one in 31 is right: no picture had this drawing here.
    assert found[unseen][tokens[unseen] > 0].float().mean() > 0.5


def test_the_sketch_of_a_condition_has_the_same_bits_in_every_batch() -> None:
    torch.manual_seed(0)
    gpt = GPT(CONFIG).eval()
    prefix = torch.randn(2, CONFIG.n_embd).repeat_interleave(8, dim=0)
    whole = gpt.sketched_one_by_one(prefix)
    assert torch.equal(whole[:1], gpt.sketched_one_by_one(prefix[:1]))
    assert torch.equal(whole[5:11], gpt.sketched_one_by_one(prefix[5:11]))
    assert torch.allclose(whole, gpt.sketched(prefix), atol=1e-5)


def test_the_condition_starts_centred_with_elements_of_size_one() -> None:
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(500, CONFIG.embed_dim) * 0.1 + 1, dim=1)
    gpt = GPT(CONFIG)
    Sketching(gpt).start_from(embeddings)
    prefix = gpt.prefix(embeddings).detach()
    assert prefix.mean(dim=0).abs().max() < 1e-3
    share = min(CONFIG.n_embd, CONFIG.embed_dim) / CONFIG.n_embd  # of the directions that embeddings have
    assert prefix.square().mean() == pytest.approx(share, rel=0.05)
