"""windows.py: several guessed positions in one step give the tokens that single steps give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import FLOAT16, TINY
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models import BUNDLED, EMOJI
from clip_gen import ClipGen
from clip_gen.networks.gpt import GPT
from clip_gen.sampling import sampler
from clip_gen.sampling.condition import Condition
from clip_gen.sampling.sampler import Batch, Sampling, candidate_uniforms
from clip_gen.sampling.windows import window_length

pytestmark = FLOAT16
NETWORKS = [{}, {"rotary": True}, {"rotary": True, "neighbour_context": True, "sketch_drawings": 2}]


def network(block_size: int = 100, n_embd: int = 32, **changes: int) -> GPT:
    """Its tokens depend on earlier ones. 100 positions are two blocks of keys."""
    torch.manual_seed(0)
    gpt = GPT(replace(TINY.gpt, n_embd=n_embd, block_size=block_size, **changes)).eval().requires_grad_(False)
    for name, parameter in gpt.named_parameters():
        if "ln_" not in name:
            parameter.normal_(std=0.15)
    return gpt.cast_for_inference(torch.float16)


def new_batch(gpt: GPT, rows: int, sampling: Sampling = Sampling(), kept: Tensor | None = None) -> Batch:  # noqa: B008, frozen
    embedding = F.normalize(torch.randn(rows, 16, generator=torch.manual_seed(1)), dim=1)
    return Batch(gpt, embedding, candidate_uniforms(3, range(rows), gpt.config.block_size), sampling, kept=kept)


def steps_of(batch: Batch) -> int:
    steps = 0
    while not batch.done:
        batch.step()
        steps += 1
    return steps


@pytest.fixture
def single_steps(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Batches take single steps until this is undone."""
    monkeypatch.setattr(sampler, "window_length", lambda *given: 1)
    return monkeypatch


@pytest.mark.parametrize("changes", NETWORKS, ids=["positions", "rotary", "neighbours-sketch"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=3.0, top_k=20), Sampling(temperature=0.5)])
def test_windows_give_the_tokens_of_single_steps(
    single_steps: pytest.MonkeyPatch, changes: dict[str, int], sampling: Sampling
) -> None:
    gpt = network(**changes)
    expected = new_batch(gpt, 1, sampling).run()
    single_steps.undo()
    batch = new_batch(gpt, 1, sampling)
    assert expected.window is None
    assert batch.window.window >= 4
    assert len(expected.tokens.unique()) > 16
    assert torch.equal(batch.run().tokens, expected.tokens)


@pytest.mark.parametrize("shape", [slice(20, 70), slice(None, None, 3), slice(0, 9), slice(90, None)])
def test_kept_tokens_stay_and_are_rated_with_the_same_bits(single_steps: pytest.MonkeyPatch, shape: slice) -> None:
    gpt = network(neighbour_context=True)
    kept = torch.randint(0, 32, (1, 100), generator=torch.Generator().manual_seed(0))
    kept[0, shape] = -1
    expected = new_batch(gpt, 1, kept=kept).run()
    single_steps.undo()
    found = new_batch(gpt, 1, kept=kept).run()
    assert found.window is not None
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.tokens[kept >= 0], kept[kept >= 0])
    assert torch.equal(found.likelihoods.of_kept, expected.likelihoods.of_kept)


def test_kept_tokens_are_right_guesses() -> None:
    gpt, kept = network(), torch.randint(0, 32, (1, 100))
    batch = new_batch(gpt, 1, kept=kept)
    assert steps_of(batch) == -(-100 // batch.window.window)


def test_the_first_guesses_are_the_likeliest_tokens_of_the_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = network(sketch_drawings=2)
    tokens = new_batch(gpt, 1).run().tokens
    prefix = gpt.prefix(F.normalize(torch.randn(1, 16, generator=torch.manual_seed(1)), dim=1))
    assert torch.equal(new_batch(gpt, 1).window.guesses, gpt.sketch.head(gpt.sketch(prefix)).argmax(dim=2))
    monkeypatch.setattr(sampler, "first_guesses", lambda *given: tokens)
    batch = new_batch(gpt, 1)
    assert steps_of(batch) == -(-100 // batch.window.window)
    assert torch.equal(batch.tokens, tokens)


def test_tokens_up_to_the_length_never_change() -> None:
    batch = new_batch(network(), 1)
    while not batch.done:
        before, length = batch.tokens.clone(), batch.length
        batch.step()
        assert batch.length > length
        assert torch.equal(batch.tokens[:, :length], before[:, :length])


def test_a_single_candidate_in_float16_on_a_cpu_has_windows() -> None:
    gpt = network()
    assert 4 <= window_length(gpt, 1, 100, 2) <= window_length(gpt, 1, 100, 1) <= 8
    assert window_length(gpt, 1, 100, 1) <= window_length(network(sketch_drawings=1), 1, 100, 1) <= 16
    assert window_length(network(n_embd=512), 1, 100, 1) <= 6
    assert window_length(gpt, 2, 100, 1) == 1
    assert window_length(gpt, 1, 3, 1) == 1
    for dtype in (torch.float32, torch.bfloat16):
        assert window_length(GPT(TINY.gpt).cast_for_inference(dtype), 1, 16, 1) == 1


PROMPTS = {
    "shapes": (BUNDLED, "a small pink heart above a large purple cross on a brown background", 100),
    "emoji": (EMOJI, "a cat on a blue background", 50),
}


@pytest.mark.parametrize("world", PROMPTS)
def test_the_bundled_models_take_fewer_steps_than_tokens(single_steps: pytest.MonkeyPatch, world: str) -> None:
    folder, prompt, most = PROMPTS[world]
    model = ClipGen.load(folder, "cpu", "float16")
    embedding, _ = model.embed(Condition(prompt, None))
    uniforms = candidate_uniforms(0, range(1), 256)
    expected = Batch(model.gpt, embedding, uniforms, Sampling()).run()
    single_steps.undo()
    batch = Batch(model.gpt, embedding, uniforms, Sampling())
    steps = steps_of(batch)
    assert steps <= most
    assert torch.equal(batch.tokens, expected.tokens)
    if batch.window.guesses is not None:
        single_steps.setattr(sampler, "first_guesses", lambda *given: None)
        assert steps_of(Batch(model.gpt, embedding, uniforms, Sampling())) > steps
