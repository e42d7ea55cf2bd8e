"""gpt.py: the transformer and its cache."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from torch import Tensor
from torch.nn import functional as F

from clip_gen.config import GPTConfig
from clip_gen.files import ROOT
from clip_gen.networks.gpt import GPT, with_null_condition
from clip_gen.networks.grid import grid_rotation, neighbour_positions, rotate


@pytest.fixture(params=[(), ("rotary",), ("rotary", "neighbour_context"), ("sketch_drawings",)], ids="-".join)
def gpt(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(TINY.gpt, **dict.fromkeys(request.param, 1))).eval()


@pytest.fixture
def embedding() -> Tensor:
    return F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(2))


def test_forward_gives_logits_for_every_position(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    assert gpt(embedding, tokens[:, :0]).shape == (3, 1, 32)
    assert gpt(embedding, tokens[:, :-1]).shape == (3, 16, 32)


def test_too_many_tokens_are_an_assertion_error(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    with pytest.raises(AssertionError):
        gpt(embedding, tokens)


def test_future_tokens_do_not_change_past_logits(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 32
    before, after = gpt(embedding, tokens[:, :-1]), gpt(embedding, changed[:, :-1])
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10], after[:, 10])


def test_every_logit_depends_on_the_embedding(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    other = gpt(embedding.roll(1, dims=0), tokens[:, :-1])
    assert ((gpt(embedding, tokens[:, :-1]) - other).abs().amax(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("on_device", [False, True])
def test_cached_and_uncached_logits_agree(gpt: GPT, embedding: Tensor, tokens: Tensor, on_device: bool) -> None:
    whole = gpt(embedding, tokens[:, :-1])
    if on_device:
        names = set(gpt.state_dict())
        gpt.cast_for_inference(torch.float32)
        assert (gpt.neighbour_table is not None) == gpt.config.neighbour_context
        assert set(gpt.state_dict()) == names
    cache = gpt.new_cache(gpt.prefix(embedding))
    stepwise = [gpt.step(last, cache) for last in (None, *tokens[:, :-1].unbind(1))]
    assert torch.allclose(torch.stack(stepwise, dim=1), whole, atol=1e-5)


def test_the_null_condition_replaces_only_unconditional_rows(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    marked = gpt(embedding, tokens[:, :5], torch.tensor([True, False, True]))
    plain = gpt(embedding, tokens[:, :5])
    assert torch.equal(marked[1], plain[1])
    assert not torch.allclose(marked[0], plain[0])
    assert torch.equal(marked[0], gpt(embedding.roll(1, dims=0), tokens[:, :5], torch.tensor([True] * 3))[0])


def test_the_null_condition_is_learned(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    gpt.train()(embedding, tokens[:, :5], torch.tensor([True, False, False])).square().mean().backward()
    assert gpt.null_condition.grad.abs().sum() > 0


def test_it_learns_tokens_that_depend_on_the_embedding(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    gpt.train()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(gpt(embedding, tokens[:, :-1]).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = gpt.eval()(embedding, tokens[:, :-1]).argmax(dim=2)
    assert (predicted == tokens).float().mean() > 0.9


def test_rotary_attention_depends_on_relative_rows_and_columns_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(3))
    rotation = grid_rotation(4, 16)
    scores = rotate(q.expand(1, 1, 16, 16), rotation) @ rotate(k.expand(1, 1, 16, 16), rotation).transpose(-2, -1)
    by_position = scores.view(4, 4, 4, 4)  # row and column of the query, row and column of the key
    assert torch.allclose(by_position[:3, 1:, :3, 1:], by_position[1:, :3, 1:, :3], atol=1e-5)
    for other in (by_position[0, 0, 0, 1], by_position[0, 0, 1, 0], by_position[0, 0, 1, 1], by_position[0, 0, 1, 2]):
        assert not torch.isclose(by_position[0, 0, 0, 0], other)


def test_neighbours_are_the_previous_token_and_those_above() -> None:
    around = neighbour_positions(4)
    assert around.shape == (16, 4)
    assert around[0].tolist() == [16, 16, 16, 16]
    assert around[2].tolist() == [1, 16, 16, 16]
    assert around[4].tolist() == [3, 16, 0, 1]
    assert around[9].tolist() == [8, 4, 5, 6]
    assert around[11].tolist() == [10, 6, 7, 16]


def test_an_input_depends_on_its_four_neighbours(embedding: Tensor, tokens: Tensor) -> None:
    """Without blocks, logits depend on the four neighbours and the condition only, on each differently."""
    torch.manual_seed(0)
    gpt = GPT(replace(TINY.gpt, neighbour_context=True)).eval()
    gpt.blocks = torch.nn.ModuleList()
    plain = gpt(embedding, tokens[:, :-1])
    for changed in range(15):
        other = tokens.clone()
        other[:, changed] = 31 - other[:, changed]
        differs = (gpt(embedding, other[:, :-1]) != plain).any(dim=2).all(dim=0)
        assert differs.tolist() == (neighbour_positions(4) == changed).any(dim=1).tolist()
    assert (gpt(embedding.roll(1, dims=0), tokens[:, :-1]) != plain).any(dim=2).all()
    swapped = tokens.clone()
    swapped[:, [4, 6]] = tokens[:, [6, 4]]
    assert not torch.isclose(gpt(embedding, swapped[:, :-1])[0, 9], plain[0, 9]).all()


def test_with_null_condition_adds_a_trainable_null_condition(embedding: Tensor, tokens: Tensor) -> None:
    bare = GPT(replace(TINY.gpt, null_condition=False, head_bias=True, rotary=True, neighbour_context=True)).eval()
    torch.nn.init.normal_(bare.condition.bias)
    assert "null_condition" not in bare.state_dict()
    grown = with_null_condition(bare)
    assert grown.config == replace(bare.config, null_condition=True)
    assert torch.equal(grown(embedding, tokens[:, :-1]), bare(embedding, tokens[:, :-1]))
    unconditional = torch.tensor([True, False, False])
    logits = grown(embedding, tokens[:, :-1], unconditional)
    assert torch.equal(logits[0], bare(torch.zeros(1, 16), tokens[:1, :-1])[0])
    logits.square().mean().backward()
    assert grown.null_condition.grad.abs().sum() > 0
    assert with_null_condition(grown) is grown


def test_unconditional_rows_need_a_null_condition(embedding: Tensor, tokens: Tensor) -> None:
    bare = GPT(replace(TINY.gpt, null_condition=False))
    with pytest.raises(AssertionError, match="never unconditional"):
        bare(embedding, tokens[:, :-1], torch.tensor([True, False, False]))


def test_a_subset_of_all_positions_gives_the_same_logits(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    positions = torch.arange(16).expand(3, 16)
    found = gpt(embedding, tokens[:, :-1], None, positions, torch.ones(3, 16))
    assert torch.allclose(found, gpt(embedding, tokens[:, :-1]), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = gpt(embedding, tokens[:, :-1], None, positions, torch.ones(3, 16))
    assert torch.allclose(found.float(), gpt(embedding, tokens[:, :-1]), atol=0.02)


def test_positions_outside_the_subset_are_ignored(gpt: GPT, embedding: Tensor, tokens: Tensor) -> None:
    positions, changed = torch.tensor([[0, 2, 7, 9], [0, 1, 2, 3], [0, 5, 9, 15]]), tokens.clone()
    changed[0, [0, 7, 13]] = 31 - tokens[0, [0, 7, 13]]  # neither earlier positions nor neighbours of the subset
    probabilities = torch.full((3, 4), 0.5)
    before, after = (gpt(embedding, t[:, :-1], None, positions, probabilities) for t in (tokens, changed))
    assert before.shape == (3, 4, 32)
    assert torch.equal(before, after)
    changed[0, 6] = 31 - tokens[0, 6]
    after = gpt(embedding, changed[:, :-1], None, positions, probabilities)
    assert torch.equal(before[0, :2], after[0, :2])
    assert not torch.isclose(before[0, 2:], after[0, 2:]).all(dim=1).any()


def test_attention_weighs_positions_by_inverse_probability(embedding: Tensor) -> None:
    """If all earlier positions but the condition are equal, a few stand for all of them."""
    torch.manual_seed(0)
    gpt = GPT(replace(TINY.gpt, n_layer=1)).eval()
    torch.nn.init.zeros_(gpt.position_embedding.weight)
    plain = torch.full((3, 15), 5)
    positions = torch.tensor([[0, 3, 4, 8, 15]]).expand(3, 5)
    probabilities = torch.tensor([[1, 3 / 14, 3 / 14, 3 / 14, 1 / 14]]).expand(3, 5)  # the last one is not used
    whole, few = gpt(embedding, plain)[:, -1], gpt(embedding, plain, None, positions, probabilities)[:, -1]
    assert torch.allclose(whole, few, atol=1e-5)
    assert not torch.allclose(whole, gpt(embedding, plain, None, positions, torch.ones(3, 5))[:, -1], atol=1e-3)


GELU = """
import torch
from torch.nn import functional as F

for threads in (1, 2, 3, 5, 8):
    torch.set_num_threads(threads)
    for width in (72, 144, 1024, 3072, 4096):
        x = torch.randn(72, width)
        every = [F.gelu(x[:rows]) for rows in (1, 4, 5, 7, 16, 20, 36, 48, 72)]
        for found in every:
            assert torch.equal(found, every[-1][: len(found)]), (threads, width, len(found))
"""


def test_gelu_of_a_row_does_not_depend_on_the_batch_or_threads() -> None:
    subprocess.run([sys.executable, "-c", GELU], cwd=ROOT, check=True)


def test_gradients_are_deterministic_on_two_threads() -> None:
    config = GPTConfig(
        n_layer=1,
        n_head=2,
        n_embd=64,
        block_size=64,
        codebook_size=64,
        embed_dim=32,
        rotary=True,
        neighbour_context=True,
        dropout=0.0,
    )
    gpt, threads = GPT(config).train(), torch.get_num_threads()
    embedding, tokens = torch.randn(64, 32), torch.randint(0, 64, (64, 64))
    positions = torch.stack(
        [torch.cat([torch.zeros(1).long(), 1 + torch.randperm(63)[:31].sort().values]) for _ in tokens]
    )

    def gradients() -> list[torch.Tensor]:
        gpt.zero_grad()
        logits = gpt(embedding, tokens[:, :-1], None, positions, torch.full((64, 32), 0.9))
        F.cross_entropy(logits.flatten(0, 1), tokens.gather(1, positions).flatten()).backward()
        return [parameter.grad for parameter in gpt.parameters() if parameter.grad is not None]

    torch.set_num_threads(2)
    try:
        first = gradients()
        for _ in range(10):
            assert all(map(torch.equal, first, gradients()))
    finally:
        torch.set_num_threads(threads)
