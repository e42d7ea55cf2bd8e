"""cuda_graphs.py: a cache of fixed size gives the same results as a growing one."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from clip_gen.networks.gpt import GPT
from clip_gen.sampling import cuda_graphs
from clip_gen.sampling import sampler as sampling_module
from clip_gen.sampling.batch_requests import Request
from clip_gen.sampling.batch_sizes import max_candidates, padded_batch_size
from clip_gen.sampling.batcher import Batcher, batch_bytes
from clip_gen.sampling.condition import Condition
from clip_gen.sampling.sampler import Batch, Sampling, candidate_uniforms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[(), ("neighbour_context",), ("sketch_drawings",)], ids="-".join)
def gpt(request: pytest.FixtureRequest, device: str) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(TINY.gpt, rotary=True, **dict.fromkeys(request.param, 1))).eval().to(device)


def new_batch(gpt: GPT, rows: int, seed: int, *, recorded: bool = True, sampling: Sampling | None = None) -> Batch:
    device = gpt.head.weight.device
    embedding = F.normalize(torch.randn(rows, gpt.config.embed_dim, generator=torch.manual_seed(seed)), dim=-1)
    uniforms = candidate_uniforms(seed, range(rows), gpt.config.block_size)
    return Batch(gpt, embedding.to(device), uniforms, sampling or Sampling(), recorded=recorded)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=3.0, top_k=5)])
@pytest.mark.parametrize("rows", [1, 16, 20])
def test_recorded_steps_sample_the_same_tokens(gpt: GPT, rows: int, sampling: Sampling) -> None:
    growing = new_batch(gpt, rows, 3, recorded=False, sampling=sampling).run().tokens
    assert growing.unique().numel() > 4
    assert torch.equal(new_batch(gpt, rows, 3, sampling=sampling).run().tokens, growing)


def test_recorded_steps_give_the_same_logits_at_every_position(gpt: GPT) -> None:
    fixed, growing = (new_batch(gpt, 16, 5, recorded=recorded) for recorded in (True, False))
    last = None
    for _ in range(gpt.config.block_size):
        with torch.inference_mode():
            logits, expected = fixed.steps(last), growing.steps(last)
        assert torch.allclose(logits, expected, atol=1e-5)
        last = expected.argmax(dim=1)


def test_a_reused_recording_keeps_nothing_of_its_last_batch(gpt: GPT) -> None:
    first = new_batch(gpt, 4, 1)
    used, expected_tokens = first.steps.recording, first.run().tokens
    second = new_batch(gpt, 4, 2).run()
    other = second.steps.recording
    assert other is not used  # the first still has it
    del first, second
    third = new_batch(gpt, 4, 1)
    assert third.steps.recording in (used, other)
    assert torch.equal(third.run().tokens, expected_tokens)


def test_concurrent_batches_do_not_share_memory(gpt: GPT) -> None:
    expected_tokens = [new_batch(gpt, 4, seed).run().tokens for seed in (1, 2)]
    batches = [new_batch(gpt, 4, seed) for seed in (1, 2)]
    for _ in range(gpt.config.block_size):
        for batch in batches:
            batch.step()
    assert all(torch.equal(batch.tokens, tokens) for batch, tokens in zip(batches, expected_tokens, strict=True))


def test_an_unfinished_batch_returns_its_recording(gpt: GPT) -> None:
    expected_tokens = new_batch(gpt, 4, 1).run().tokens
    half = new_batch(gpt, 4, 2)
    half.step()
    del half
    assert torch.equal(new_batch(gpt, 4, 1).run().tokens, expected_tokens)
    assert len(cuda_graphs._idle[gpt][padded_batch_size(gpt, 4)]) == 1


def test_idle_recordings_are_deleted_except_the_next_one(gpt: GPT) -> None:
    cuda_graphs._idle.clear()
    few, many = padded_batch_size(gpt, 4), padded_batch_size(gpt, 40)
    batches = [new_batch(gpt, rows, 1) for rows in (4, 4, 40)]
    small, large = batches[0].steps.recording.nbytes, batches[2].steps.recording.nbytes
    del batches
    idle = cuda_graphs._idle[gpt]
    cuda_graphs.forget_idle(small + large, gpt, few)
    assert [len(idle[rows]) for rows in (few, many)] == [2, 1]
    cuda_graphs.forget_idle(2 * small, gpt, many)
    assert [len(idle[rows]) for rows in (few, many)] == [2, 1]
    cuda_graphs.forget_idle(large, gpt, few)
    assert [len(idle[rows]) for rows in (few, many)] == [1, 1]
    cuda_graphs.forget_idle(-1, gpt, few)
    assert [len(idle[rows]) for rows in (few, many)] == [1, 0]


def test_a_batcher_keeps_recordings_within_its_memory(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        at_a_time, decode_threads, likelihood_weight = 16, 1, 0.0

        def embed(self, condition: Condition) -> tuple[Tensor, None]:
            return F.normalize(torch.ones(1, gpt.config.embed_dim, device=gpt.device), dim=1), None

        def conditions(self, request: Request) -> Tensor:
            return request.embedding.expand(len(request.uniforms), -1)

        def decode(self, tokens: Tensor, embeddings: Tensor, _: object) -> list[tuple[Image.Image, float]]:
            return [(Image.new("L", (1, 1)), 0.0)] * len(tokens)

    cuda_graphs._idle.clear()
    monkeypatch.setattr("clip_gen.sampling.batch_requests.Batch", partial(Batch, recorded=True))
    most = batch_bytes(gpt, Sampling(), max_candidates(gpt))
    batcher, model = Batcher(most), Model()
    model.gpt = gpt
    for candidates in (1, 40, 1, 20, 40):
        for guidance in (1.0, 2.0):
            uniforms = candidate_uniforms(1, range(candidates), gpt.config.block_size)
            batcher.draw(Request(model, Condition("a star"), uniforms, Sampling(guidance=guidance)))
    held = sum(recording.nbytes for idle in cuda_graphs._idle[gpt].values() for recording in idle)
    assert held <= 2 * most  # the last one used, with guidance


def test_recordings_are_freed_with_their_transformer(gpt: GPT) -> None:
    own = GPT(TINY.gpt).eval().to(gpt.head.weight.device)
    new_batch(own, 2, 0).run()
    recording = weakref.ref(cuda_graphs._idle[own][padded_batch_size(own, 2)][0])
    del own
    gc.collect()
    assert recording() is None


@pytest.mark.parametrize("neighbour_context", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=5, top_p=0.9, guidance=3.0), Sampling(temperature=0)],
    ids=["plain", "filtered", "greedy"],
)
def test_no_step_synchronizes_or_mixes_devices(
    neighbour_context: bool, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fake tensors on a GPU: reading their values and mixing devices are errors.
    monkeypatch.setattr(cuda_graphs.Recording, "_record", lambda *_: None)
    monkeypatch.setattr(cuda_graphs, "weight_addresses", lambda gpt: [])
    for module in (cuda_graphs, sampling_module):
        monkeypatch.setattr(module, "has_kernels", lambda device: False)
    with FakeTensorMode(), torch.device("cuda"):
        gpt = GPT(replace(TINY.gpt, rotary=True, neighbour_context=neighbour_context)).eval()
        if neighbour_context:
            gpt._precompute_neighbours()  # as cast_for_inference does, which cannot change such parameters
        embedding = torch.randn(40, gpt.config.embed_dim)
        batch = Batch(gpt, embedding, torch.rand(40, gpt.config.block_size), sampling)
        tokens = batch.run().tokens
        assert tokens.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            tokens.max().item()


def test_a_recording_is_not_reused_after_its_weights_moved(gpt: GPT) -> None:
    expected_tokens = new_batch(gpt, 4, 1).run().tokens
    (used,) = cuda_graphs._idle[gpt][padded_batch_size(gpt, 4)]
    before = [parameter.data for parameter in gpt.parameters()]  # kept, so that no other tensor gets their memory
    for parameter in gpt.parameters():
        parameter.data = parameter.data.clone()
    again = new_batch(gpt, 4, 1)
    assert again.steps.recording is not used
    for data in before:
        data.zero_()
    assert torch.equal(again.run().tokens, expected_tokens)
    del again
    assert len(cuda_graphs._idle[gpt][padded_batch_size(gpt, 4)]) == 1
    cuda_graphs.forget(gpt)
    assert gpt not in cuda_graphs._idle


def test_without_triton_a_gpu_uses_plain_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "clip_gen.sampling.triton_kernels", None)
    assert not cuda_graphs.has_kernels(torch.device("cuda", 99))  # used by no other test: the answer is cached
    assert "Triton does not work here" in caplog.text
