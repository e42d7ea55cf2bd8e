"""diagonal.py: with a row delay all rows of a picture are sampled at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FLOAT16, TINY, tiny_networks
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_gen import ClipGen
from clip_gen.networks.gpt import GPT
from clip_gen.networks.grid import diagonal_steps, neighbour_positions
from clip_gen.sampling.sampler import Batch, Sampling, candidate_uniforms, draw, filtered_probabilities
from clip_gen.training.gpt_trainer import GPTTrainer
from clip_gen.training.stage import FitConfig
from clip_gen.weights.model_folder import save_networks

DELAYED = replace(TINY.gpt, rotary=True, neighbour_context=True, row_delay=2)
SIDE = 6
KINDS = [{}, {"rotary": False}, {"row_delay": 3, "sketch_drawings": 2}]


def network(dtype: torch.dtype | None = None, side: int = SIDE, **changes: int) -> GPT:
    """Its tokens depend on earlier ones."""
    torch.manual_seed(0)
    gpt = GPT(replace(DELAYED, block_size=side**2, **changes)).eval().requires_grad_(False)
    for name, parameter in gpt.named_parameters():
        if "ln_" not in name:
            parameter.normal_(std=0.2)
    return gpt if dtype is None else gpt.cast_for_inference(dtype)


def embeddings(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, 16, generator=torch.manual_seed(1)), dim=1)


def batch_of(gpt: GPT, rows: int, sampling: Sampling = Sampling(), **others: Tensor) -> Batch:  # noqa: B008, frozen
    uniforms = candidate_uniforms(3, range(rows), gpt.config.block_size)
    return Batch(gpt, embeddings(rows), uniforms, sampling, likelihoods=True, **others)


@pytest.mark.parametrize("delay", [2, 3, 5])
def test_every_neighbour_is_sampled_in_an_earlier_step(delay: int) -> None:
    steps = torch.cat([diagonal_steps(SIDE, delay), torch.tensor([-1])])  # the last: outside the grid
    assert (steps[neighbour_positions(SIDE, delay)] < steps[:-1, None]).all()
    assert int(steps.amax()) == (SIDE - 1) * (1 + delay)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_position_depends_on_earlier_steps_alone(changes: dict[str, int]) -> None:
    gpt = network(**changes)
    tokens = torch.randint(0, 32, (1, SIDE**2), generator=torch.Generator().manual_seed(0))
    before = gpt(embeddings(1), tokens[:, :-1])
    for position in (0, 5, 14, 27):
        changed = tokens.clone()
        changed[0, position] = 31 - changed[0, position]
        differs = (gpt(embeddings(1), changed[:, :-1]) != before).any(dim=2)[0]
        later = gpt.steps > gpt.steps[position]
        assert not (differs & ~later).any()
        assert (differs == later).float().mean() > 0.8  # the first input with this token may be some steps later


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=3.0, top_k=20), Sampling(temperature=0.5)])
def test_tokens_are_drawn_from_the_logits_of_the_whole_picture(changes: dict[str, int], sampling: Sampling) -> None:
    gpt, steps = network(**changes), 0
    batch = batch_of(gpt, 3, sampling)
    while not batch.done:
        before, known = batch.tokens.clone(), batch.drawn
        assert int(known.sum()) == batch.length
        batch.step()
        assert torch.equal(batch.tokens[:, known], before[:, known])
        steps += 1
    assert steps == len(gpt.steps.unique())
    conditional, unconditional = (
        gpt(embeddings(3), batch.tokens[:, :-1], torch.full((3,), drop)).flatten(0, 1) for drop in (False, True)
    )
    logits = unconditional + sampling.guidance * (conditional - unconditional)
    uniforms = candidate_uniforms(3, range(3), SIDE**2)
    expected = draw(filtered_probabilities(logits, sampling), uniforms.flatten()).view(3, -1)
    assert (expected == batch.tokens).float().mean() > 0.97  # rounding
    logs = conditional.log_softmax(dim=1).gather(1, batch.tokens.view(-1, 1)).view(3, -1)
    assert torch.allclose(batch.likelihoods.of_sampled, logs.mean(dim=1), atol=1e-4)
    assert len(batch.tokens.unique()) > 16


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=FLOAT16)], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=2.0)])
def test_a_candidate_has_the_same_bits_in_every_batch(dtype: torch.dtype, sampling: Sampling) -> None:
    gpt = network(dtype, side=12)
    many = batch_of(gpt, 21, sampling).run()
    for rows in (1, 2, 5):
        few = batch_of(gpt, rows, sampling).run()
        assert torch.equal(few.tokens, many.tokens[:rows])
        assert torch.equal(few.likelihoods.of_sampled, many.likelihoods.of_sampled[:rows])


def test_kept_tokens_stay_and_those_after_a_sampled_one_are_rated() -> None:
    gpt, kept = network(), torch.randint(0, 32, (2, SIDE**2), generator=torch.Generator().manual_seed(0))
    kept[0], kept[1, [15, 16, 20]] = -1, -1
    batch = batch_of(gpt, 2, kept=kept).run()
    assert torch.equal(batch.tokens[0], batch_of(gpt, 1).run().tokens[0])
    assert torch.equal(batch.tokens[kept >= 0], kept[kept >= 0])
    logs = gpt(embeddings(2), batch.tokens[:, :-1]).log_softmax(dim=2).gather(2, batch.tokens[..., None])[1, :, 0]
    follow = (gpt.steps > gpt.steps[15]) & (kept[1] >= 0)
    assert batch.likelihoods.of_kept.tolist() == pytest.approx([0, float(logs[follow].mean())], abs=1e-4)


def test_a_random_subset_of_all_positions_gives_the_logits_of_all() -> None:
    gpt, tokens = network(), torch.randint(0, 32, (2, SIDE**2))
    positions = torch.arange(SIDE**2).expand(2, -1)
    found = gpt(embeddings(2), tokens[:, :-1], None, positions, torch.ones(2, SIDE**2))
    assert torch.allclose(found, gpt(embeddings(2), tokens[:, :-1]), atol=1e-5)


def test_stage_2_learns_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that begin with a token of the condition; each token follows from the one above, or to the left."""
    torch.manual_seed(0)
    gpt = GPT(replace(DELAYED, dropout=0.0))
    trainer = GPTTrainer(gpt, FitConfig(steps=120, learning_rate=0.01))
    monkeypatch.setattr(trainer, "log_dict", lambda *given, **named: None)
    optimizer = torch.optim.Adam(gpt.parameters(), lr=0.01)
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    conditions, colours = embeddings(4), (torch.arange(4)[:, None] * 7 + 3 * column + 5 * row) % 32
    for _ in range(120):
        batch = conditions, colours, torch.zeros(4, dtype=torch.bool), conditions, conditions
        loss = trainer.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = Batch(gpt.eval().requires_grad_(False), conditions, torch.rand(4, 16), Sampling(temperature=0)).run()
    assert torch.equal(drawn.tokens, colours)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ClipGen:
    path = tmp_path_factory.mktemp("models") / "delayed"
    save_networks(tiny_networks(config=replace(TINY, gpt=DELAYED)), path, training={})
    return ClipGen.load(path, "cpu")


def test_a_model_draws_with_masks_previews_and_guidance(model: ClipGen) -> None:
    white, half = Image.new("L", (16, 16), 255), Image.new("L", (16, 16), 0)
    half.paste(255, (0, 0, 16, 8))
    picture, heard = Image.new("RGB", (16, 16), "red"), []
    plain = model.generate("a star", candidates=5, num_outputs=5, seed=0, clip_rerank=False)
    few = model.generate("a star", candidates=2, num_outputs=2, seed=0, clip_rerank=False)
    assert torch.equal(few.tokens, plain.tokens[:2])
    settings = {"candidates": 5, "num_outputs": 5, "seed": 0, "clip_rerank": False, "init_image": picture}
    assert torch.equal(model.generate("a star", mask=white, **settings).tokens, plain.tokens)
    redrawn = model.generate(
        "a star", mask=half, **settings, guidance=2.0, previews=True, on_progress=heard.append, progress_seconds=0
    )
    kept = model.vqgan.encode((torch.tensor([1.0, -1, -1])[:, None, None]).expand(1, 3, 16, 16))[0]
    assert torch.equal(redrawn.tokens[:, 12:], kept[12:].expand(5, -1))
    assert [progress.tokens for progress in heard] == sorted(progress.tokens for progress in heard)
    assert any(progress.preview is not None for progress in heard[:-1])


def test_a_row_delay_needs_the_neighbours_in_earlier_steps(tmp_path: Path) -> None:
    for changes, sentence in (({"row_delay": 1}, "row_delay is 1"), ({"neighbour_context": False}, "row_delay is 2")):
        with pytest.raises(ValueError, match=f"gpt.{sentence}; give 0, or 2 or more with gpt.neighbour_context"):
            replace(TINY, gpt=replace(DELAYED, **changes)).check()
