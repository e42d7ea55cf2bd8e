"""sampler.py: logits to tokens; the same seed gives the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import (
    Sampling,
    candidate_uniforms,
    draw,
    filtered_probabilities,
    guided,
    sample_tokens,
)

LENGTH = TINY.gpt.block_size
LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY.gpt).eval()


def sampled(gpt: GPT, rows: int, sampling: Sampling = Sampling(), seed: int = 3) -> torch.Tensor:  # noqa: B008, frozen
    embedding = F.normalize(torch.ones(1, 16), dim=-1).expand(rows, -1)
    return sample_tokens(gpt, embedding, candidate_uniforms(seed, range(rows), 16), sampling)


def test_default_settings_do_not_change_the_distribution() -> None:
    assert torch.allclose(filtered_probabilities(LOGITS, Sampling()), LOGITS.exp())


def test_temperature_sharpens_or_flattens_and_zero_is_greedy() -> None:
    sharp, flat = (filtered_probabilities(LOGITS, Sampling(temperature=t)) for t in (0.5, 2.0))
    assert sharp[0, 0] > 0.5 > flat[0, 0]
    greedy = filtered_probabilities(LOGITS, Sampling(temperature=0))
    assert greedy.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_top_k_keeps_the_k_likeliest() -> None:
    kept = filtered_probabilities(LOGITS, Sampling(top_k=2))
    assert (kept > 0).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert torch.allclose(kept[0, :2], torch.tensor([2 / 3, 1 / 3]))
    assert torch.equal(filtered_probabilities(LOGITS, Sampling(top_k=9)), filtered_probabilities(LOGITS, Sampling()))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_keeps_exactly_k_tokens_with_ties_the_first(k: int) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 1.0, 1.0], [2.0] * 6])
    kept = filtered_probabilities(logits, Sampling(top_k=k)) > 0
    assert [row.nonzero().flatten().tolist() for row in kept] == [sorted([1, 3, 2, 4, 5, 0][:k]), list(range(k))]


def test_a_row_has_the_same_probabilities_in_any_batch_for_any_codebook() -> None:
    logits = torch.randn(4, 65536, generator=torch.Generator().manual_seed(0))
    sampling, threads = Sampling(top_p=0.9), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = filtered_probabilities(logits, sampling)
        alone = [filtered_probabilities(row[None], sampling)[0] for row in logits]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.stack(alone), together)


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.01, 1), (0.49, 1), (0.51, 2), (0.76, 3), (0.95, 4)])
def test_top_p_keeps_the_fewest_tokens_that_sum_to_it(top_p: float, kept: int) -> None:
    probabilities = filtered_probabilities(LOGITS, Sampling(top_p=top_p))
    assert (probabilities[0] > 0).sum() == kept
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(2))


def test_guidance_interpolates_and_extrapolates_logits() -> None:
    conditional, unconditional = LOGITS[:1], LOGITS[1:]
    assert torch.allclose(guided(conditional, unconditional, 1), conditional)
    assert torch.allclose(guided(conditional, unconditional, 0), unconditional)
    assert torch.allclose(guided(conditional, unconditional, 3), 3 * conditional - 2 * unconditional)


def test_draws_follow_the_probabilities() -> None:
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = draw(LOGITS[:1].exp().expand(1000, -1), uniform)
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 250, 150, 100]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(3, -1)
    assert draw(probabilities, torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 2, 2]


def test_a_row_of_nan_gives_a_valid_token_and_does_not_affect_others() -> None:
    probabilities = LOGITS.exp()
    with_nan = torch.stack([probabilities[0], torch.full((4,), torch.nan), probabilities[1]])
    uniform = torch.tensor([0.6, 0.6, 0.6])
    tokens = draw(with_nan, uniform)
    assert torch.equal(tokens[[0, 2]], draw(probabilities, uniform[:2]))
    assert 0 <= tokens[1] < 4


def test_random_numbers_depend_on_seed_and_candidate_only() -> None:
    many = candidate_uniforms(5, range(40), 16)
    assert torch.equal(many[7:9], candidate_uniforms(5, range(7, 9), 16))
    assert many.unique().numel() > 600
    assert not torch.equal(many, candidate_uniforms(6, range(40), 16))


def test_a_tiny_temperature_is_greedy() -> None:
    tiny = filtered_probabilities(LOGITS, Sampling(temperature=1e-38))
    assert torch.equal(tiny, filtered_probabilities(LOGITS, Sampling(temperature=0)))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=8, top_p=0.9, temperature=0.8, guidance=3.0)])
def test_the_first_n_of_a_batch_equal_a_run_with_n(gpt: GPT, sampling: Sampling) -> None:
    many = sampled(gpt, 16, sampling)
    for n in (1, 2, 15):
        assert torch.equal(sampled(gpt, n, sampling), many[:n])


def test_tokens_depend_on_the_seed(gpt: GPT) -> None:
    assert torch.equal(sampled(gpt, 4), sampled(gpt, 4))
    assert not torch.equal(sampled(gpt, 4), sampled(gpt, 4, seed=4))


def test_cached_sampling_equals_full_recomputation(gpt: GPT) -> None:
    uniforms = candidate_uniforms(3, range(4), 16)
    embedding = F.normalize(torch.ones(1, 16), dim=-1).expand(4, -1)
    sampling = Sampling(top_p=0.8, guidance=2.0)
    tokens = torch.zeros(4, 0, dtype=torch.long)
    null = torch.ones(4, dtype=torch.bool)
    for t in range(16):
        logits = guided(gpt(embedding, tokens)[:, -1], gpt(embedding, tokens, null)[:, -1], 2.0)
        chosen = draw(filtered_probabilities(logits, sampling), uniforms[:, t])
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    assert torch.equal(sampled(gpt, 4, sampling), tokens)


def test_greedy_candidates_are_equal(gpt: GPT) -> None:
    tokens = sampled(gpt, 4, Sampling(temperature=0))
    assert torch.equal(tokens, tokens[:1].expand(4, -1))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": 21.0}, "guidance is 21.0"),
        ({"top_p": None}, "top_p is None"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"guidance": np.float64("nan")}, "guidance is nan"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": np.True_}, "top_p is np.True_"),
    ],
)
def test_a_wrong_value_is_reported_with_its_range(values: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}; give a (whole )?number"):
        Sampling(**values).check()


def test_numpy_numbers_are_accepted() -> None:
    Sampling(top_k=np.int64(5), top_p=np.float32(0.5), temperature=np.float64(1), guidance=np.int8(2)).check()


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({}, []),
        ({"top_k": 2, "top_p": 0.9, "temperature": 0.5}, []),
        ({"temperature": 0}, ["temperature"]),
        ({"top_k": 1, "top_p": 0.0}, ["top_k", "top_p"]),
    ],
)
def test_greedy_settings_are_detected(gpt: GPT, settings: dict[str, float], alone: list[str]) -> None:
    assert Sampling(**settings).greedy == alone
    assert (len(set(map(tuple, sampled(gpt, 8, Sampling(**settings)).tolist()))) == 1) == bool(alone)
