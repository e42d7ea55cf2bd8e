"""batcher.py: several requests share a device, without any effect on their tokens."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar, NamedTuple

import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_gen.files import ROOT
from clip_gen.hardware import one_thread
from clip_gen.networks.gpt import GPT
from clip_gen.networks.kv_cache import KVCache
from clip_gen.sampling import sampler
from clip_gen.sampling.batch_requests import Request
from clip_gen.sampling.batch_sizes import STANDARD_ROWS, max_candidates
from clip_gen.sampling.batcher import MIN_PRODUCT_FOR_THREADS, Batcher, batch_bytes, shared_batcher
from clip_gen.sampling.condition import Condition
from clip_gen.sampling.sampler import Sampling, Stopped, candidate_uniforms, sample_tokens

LENGTH = TINY.gpt.block_size
PLAIN = Sampling()


def embedding(number: int) -> Tensor:
    return F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(number)), dim=-1)


class FakeInpainting(NamedTuple):
    kept: Tensor  # (T,)


class FakeModel:
    """A transformer without CLIP and VQGAN: prompts are numbers, and the score of an image is its first token."""

    at_a_time, decode_threads, likelihood_weight = 4, 1, 0.0

    def __init__(self, gpt: GPT):
        self.gpt = gpt
        self.decoded: list[list[float]] = []  # for each call of decode: the first number of each embedding

    def embed(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        negative = condition.negative_prompt
        return embedding(int(condition.prompt)), embedding(int(negative)) if negative else None

    def conditions(self, request: Request) -> Tensor:
        return request.embedding.expand(len(request.uniforms), -1)

    def kept_tokens(self, inpainting: FakeInpainting) -> Tensor:
        return inpainting.kept

    def decode(self, tokens: Tensor, embeddings: Tensor, _: object) -> list[tuple[Image.Image, float]]:
        self.decoded.append(embeddings[:, 0].tolist())
        return [(Image.new("L", (1, 1)), float(first)) for first in tokens[:, 0]]


@pytest.fixture
def model() -> FakeModel:
    torch.manual_seed(0)
    return FakeModel(GPT(TINY.gpt).eval().requires_grad_(False))


@pytest.fixture
def batcher() -> Batcher:
    return Batcher(max_bytes=1e9)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def tokens_alone(model: FakeModel, number: int, candidates: int = 2, sampling: Sampling = PLAIN) -> Tensor:
    uniforms = candidate_uniforms(number, range(candidates), LENGTH)
    return sample_tokens(model.gpt, embedding(number).expand(candidates, -1), uniforms, sampling)


def request(model: FakeModel, number: int, candidates: int = 2, *settings: object, **named: object) -> Request:
    uniforms = candidate_uniforms(number, range(candidates), model.gpt.config.block_size)
    return Request(model, Condition(str(number)), uniforms, *(settings or [PLAIN]), **named)


def draw(batcher: Batcher, *settings: object, **named: object) -> Request:
    drawn = request(*settings, **named)
    batcher.draw(drawn)
    return drawn


def tokens(drawn: Request) -> Tensor:
    return torch.stack([candidate.tokens for candidate in drawn.best])


class HeldThread:
    """Keeps the batcher's thread busy, so that it receives all requests of the `with` block at once."""

    def __init__(self, batcher: Batcher):
        self.batcher, self.release = batcher, threading.Event()

    def __enter__(self) -> None:
        held = threading.Event()
        self.batcher.submit(lambda: (held.set(), self.release.wait(10)))
        assert held.wait(10)

    def __exit__(self, *_: object) -> None:
        self.release.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for 10 seconds"
        time.sleep(0.001)


def wait_until_arrived(batcher: Batcher, count: int) -> None:
    wait_until(lambda: len(batcher._arrived) >= count)


def test_tokens_of_a_request_do_not_depend_on_other_requests(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    settings = [Sampling(), Sampling(top_p=0.9, temperature=0.8), Sampling(guidance=3.0), Sampling()]
    inputs = [(number, 1 + 5 * number % 23, settings[number % 4]) for number in range(12)]
    drawn = [threads.submit(draw, batcher, model, *one) for one in inputs]
    for one, future in zip(inputs, drawn, strict=True):
        assert torch.equal(tokens(future.result(30)), tokens_alone(model, *one)), one


def test_requests_with_equal_settings_share_a_batch(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    with HeldThread(batcher):
        drawn = [threads.submit(draw, batcher, model, number) for number in range(8)]
        wait_until_arrived(batcher, 8)
    assert [future.result(30).metrics["rows_in_batch"] for future in drawn] == [16] * 8
    with HeldThread(batcher):
        drawn = [threads.submit(draw, batcher, model, number, 2, Sampling(top_k=number)) for number in (1, 2)]
        wait_until_arrived(batcher, 2)
    assert [future.result(30).metrics["rows_in_batch"] for future in drawn] == [2, 2]


def test_a_batch_waits_for_more_requests_but_not_forever(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(count: int) -> list[float]:
        drawn = []
        for number in range(count):
            drawn.append(threads.submit(draw, batcher, model, number))
            time.sleep(0.1)
        return [future.result(30).metrics["rows_in_batch"] for future in drawn]

    monkeypatch.setattr("clip_gen.sampling.batcher.WAIT_SECONDS", 1.0)
    monkeypatch.setattr("clip_gen.sampling.batcher.MAX_WAIT_SECONDS", 10.0)
    assert rows(4) == [8] * 4
    monkeypatch.setattr("clip_gen.sampling.batcher.MAX_WAIT_SECONDS", 0.25)
    assert max(rows(7)) < 14


def test_a_batch_waits_until_all_prompts_are_embedded(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(condition: Condition) -> tuple[Tensor, None]:
        time.sleep(0.15)  # longer than MAX_WAIT_SECONDS
        return embedding(int(condition.prompt)), None

    monkeypatch.setattr(model, "embed", slowly)
    with HeldThread(batcher):
        drawn = [threads.submit(draw, batcher, model, number) for number in range(3)]
        wait_until_arrived(batcher, 3)
    assert [future.result(30).metrics["rows_in_batch"] for future in drawn] == [6] * 3


def test_a_request_starts_while_another_is_running(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    order: list[str] = []
    second: list[Future[Request]] = []

    def watch_first() -> bool:
        order.append("first")
        if batcher.batches and not second:
            stop = lambda: order.append("second")  # noqa: E731
            second.append(threads.submit(draw, batcher, model, 2, should_stop=stop))
            wait_until_arrived(batcher, 1)
            time.sleep(0.03)  # longer than WAIT_SECONDS
        return False

    first = threads.submit(draw, batcher, model, 1, should_stop=watch_first)
    assert torch.equal(tokens(first.result(30)), tokens_alone(model, 1))
    assert torch.equal(tokens(second[0].result(30)), tokens_alone(model, 2))
    start = order.index("second")
    assert order[start : start + 4] in (["second", "first"] * 2, ["first", "second"] * 2)


def test_a_stopped_request_ends_within_a_token_and_others_continue(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    lengths: list[int] = []

    def stop_after_five_tokens() -> bool:
        lengths.extend(batch.length for batch in batcher.batches)
        return lengths[-1:] == [5]

    with HeldThread(batcher):
        stopped = threads.submit(draw, batcher, model, 1, 14, should_stop=stop_after_five_tokens)
        stays = threads.submit(draw, batcher, model, 2)
        wait_until_arrived(batcher, 2)
    with pytest.raises(Stopped):
        stopped.result(30)
    assert lengths == [1, 2, 3, 4, 5]
    assert torch.equal(tokens(stays.result(30)), tokens_alone(model, 2))
    assert all(len(set(embeddings)) == 1 for embeddings in model.decoded)  # of the second request alone
    with pytest.raises(Stopped):
        draw(batcher, model, 3, should_stop=lambda: True)
    wait_until(lambda: not batcher.batches)


@pytest.mark.parametrize(("room", "batches"), [(0, 1), (1, 1), (2, 2), (100, 3)])
def test_running_batches_fit_into_the_memory_budget(
    model: FakeModel, threads: ThreadPoolExecutor, room: int, batches: int
) -> None:
    running, full = [], max_candidates(model.gpt)
    batcher = Batcher(max_bytes=room * batch_bytes(model.gpt, PLAIN, full))

    def watch() -> bool:
        running.append(len(batcher.batches))
        return False

    with HeldThread(batcher):
        drawn = [threads.submit(draw, batcher, model, number, full, should_stop=watch) for number in range(3)]
        wait_until_arrived(batcher, 3)
    for future in drawn:
        finished = future.result(30)
        assert torch.equal(tokens(finished), tokens_alone(model, int(finished.condition.prompt), full))
    assert max(running) == batches


@pytest.mark.parametrize(("room", "larges"), [(0, 1), (1, 1), (2, 2), (100, 1)])
def test_a_small_request_does_not_wait_for_all_of_a_large_one(
    model: FakeModel, threads: ThreadPoolExecutor, room: int, larges: int
) -> None:
    count = 40 * STANDARD_ROWS
    batcher = Batcher(max_bytes=room * batch_bytes(model.gpt, PLAIN, max_candidates(model.gpt)))
    with HeldThread(batcher):
        large = [threads.submit(draw, batcher, model, number, count) for number in range(larges)]
        wait_until_arrived(batcher, larges)
        small = threads.submit(draw, batcher, model, 7)
        wait_until_arrived(batcher, larges + 1)
    assert torch.equal(tokens(small.result(30)), tokens_alone(model, 7))
    assert not any(future.done() for future in large)
    for number, future in enumerate(large):
        assert torch.equal(tokens(future.result(60)), tokens_alone(model, number, count))


def test_an_error_in_should_stop_or_the_prompt_ends_one_request_only(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    def broken() -> bool:
        raise KeyError("broken")

    with HeldThread(batcher):
        drawn = [
            threads.submit(draw, batcher, model, 1, should_stop=broken),
            threads.submit(draw, batcher, model, 2),
            threads.submit(draw, batcher, model, 3, should_stop=lambda: sys.exit("exit 3")),
            threads.submit(batcher.draw, Request(model, Condition("not a number"), torch.zeros(1, LENGTH), PLAIN)),
        ]
        wait_until_arrived(batcher, 4)
    for future, error, message in (
        (drawn[0], KeyError, "broken"),
        (drawn[2], SystemExit, "exit 3"),
        (drawn[3], ValueError, "not a number"),
    ):
        with pytest.raises(error, match=message):
            future.result(30)
    assert torch.equal(tokens(drawn[1].result(30)), tokens_alone(model, 2))


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_an_error_of_one_transformer_does_not_reach_requests_of_another(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor, error: type[BaseException]
) -> None:
    class Broken(GPT):
        def step(self, *_: object) -> Tensor:
            raise error("out of memory")

    broken = FakeModel(Broken(TINY.gpt).eval())
    bad, good = threads.submit(draw, batcher, broken, 1), threads.submit(draw, batcher, model, 2)
    with pytest.raises(error, match="out of memory"):
        bad.result(30)
    assert torch.equal(tokens(good.result(30)), tokens_alone(model, 2))


def test_an_error_in_decoding_reaches_the_requests_of_that_model_only(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the scores are [nan]")

    bad = FakeModel(model.gpt)
    monkeypatch.setattr(bad, "decode", broken)
    with HeldThread(batcher):
        drawn = [threads.submit(draw, batcher, which, number) for number, which in enumerate((bad, model, bad))]
        wait_until_arrived(batcher, 3)
    for future in (drawn[0], drawn[2]):
        with pytest.raises(ValueError, match="the scores are"):
            future.result(30)
    finished = drawn[1].result(30)
    assert finished.metrics["rows_in_batch"] == 6
    assert torch.equal(tokens(finished), tokens_alone(model, 1))


def test_an_error_in_decoding_reaches_no_request_whose_candidates_decode_alone(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_decode, damaged = model.decode, embedding(0)

    def decode(tokens: Tensor, embeddings: Tensor, _: object) -> list[tuple[Image.Image, float]]:
        if (embeddings == damaged).all(dim=1).any():
            raise ValueError("the scores are [nan]")
        if len(tokens) > 3:
            raise RuntimeError("out of memory")
        return plain_decode(tokens, embeddings, _)

    monkeypatch.setattr(model, "decode", decode)
    with HeldThread(batcher):
        drawn = [threads.submit(draw, batcher, model, number) for number in range(2)]
        wait_until_arrived(batcher, 2)
    with pytest.raises(ValueError, match="the scores are"):
        drawn[0].result(30)
    assert torch.equal(tokens(drawn[1].result(30)), tokens_alone(model, 1))
    assert torch.equal(tokens(draw(batcher, model, 2, 9)), tokens_alone(model, 2, 9))


def test_an_error_of_the_batcher_itself_reaches_every_caller(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(batcher, "_next_requests", lambda: 1 / 0)
        for future in [threads.submit(draw, batcher, model, number) for number in range(3)]:
            with pytest.raises(ZeroDivisionError):
                future.result(30)
    assert torch.equal(tokens(draw(batcher, model, 1)), tokens_alone(model, 1))


def test_a_closed_batcher_ends_its_requests(model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor) -> None:
    unfinished = [threads.submit(draw, batcher, model, number, 4000) for number in range(2)]
    wait_until(lambda: batcher.batches)
    batcher.close()
    for future in [*unfinished, threads.submit(draw, batcher, model, 1)]:
        with pytest.raises(Stopped):
            future.result(30)


AFTER_THE_MAIN_THREAD = """
import threading
import time
from clip_gen import ClipGen

model = ClipGen.load("checkpoints/shapes", "cpu")

def draw(candidates):
    print(candidates, len(model.generate("a circle", candidates, 1).images))

def draw_at_the_end():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    draw(2)

for _ in range(2):
    threading.Thread(target=draw, args=(256,), daemon=True).start()
threading.Thread(target=draw_at_the_end).start()
"""


def test_threads_draw_after_the_main_thread_and_daemon_threads_delay_no_exit() -> None:
    command = [sys.executable, "-c", AFTER_THE_MAIN_THREAD]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "2 1\n")


def test_guidance_needs_a_null_condition(batcher: Batcher) -> None:
    bare = FakeModel(GPT(replace(TINY.gpt, null_condition=False)).eval())
    with pytest.raises(ValueError, match=r"guidance is 2.0, but this model was trained without a null condition"):
        draw(batcher, bare, 1, 2, Sampling(guidance=2.0))


def test_a_negative_embedding_takes_the_place_of_the_null_condition(batcher: Batcher) -> None:
    bare, guided = FakeModel(GPT(replace(TINY.gpt, null_condition=False)).eval()), Sampling(guidance=2.0)
    asked = Request(bare, Condition("1", negative_prompt="2"), candidate_uniforms(1, range(3), LENGTH), guided)
    batcher.draw(asked)
    first = [bare.gpt(embedding(number), torch.zeros(1, 0, dtype=torch.long))[:, 0] for number in (1, 2)]
    logits = first[1] + 2 * (first[0] - first[1])
    assert torch.equal(tokens(asked)[:, 0], sampler.draw(logits.softmax(1).expand(3, -1), asked.uniforms[:, 0]))
    # So it counts against candidates when they are ranked.
    assert torch.equal(torch.tensor(bare.decoded[0][0]), (embedding(1) - embedding(2))[0, 0])


def test_requests_with_and_without_a_negative_embedding_do_not_affect_each_other(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    def asked(number: int) -> Request:
        condition = Condition(str(number), negative_prompt=str(number + 50) if number % 2 else "")
        uniforms = candidate_uniforms(number, range(3), LENGTH)
        return Request(model, condition, uniforms, Sampling(guidance=2.0))

    def drawn(request: Request) -> list[list[int]]:
        batcher.draw(request)
        return tokens(request).tolist()

    alone = [drawn(asked(number)) for number in range(8)]
    with HeldThread(batcher):
        together = [threads.submit(drawn, asked(number)) for number in range(8)]
        wait_until_arrived(batcher, 8)
    assert [future.result(30) for future in together] == alone


def test_candidates_of_several_requests_are_decoded_together(
    model: FakeModel, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    with HeldThread(batcher):
        drawn = [threads.submit(draw, batcher, model, number, count) for number, count in enumerate((3, 1, 2))]
        wait_until_arrived(batcher, 3)
    for future in drawn:
        future.result(30)
    assert [len(embeddings) for embeddings in model.decoded] == [4, 2]
    assert len(set(model.decoded[0])) >= 2


def test_the_best_candidates_come_first_or_all_in_their_order(model: FakeModel, batcher: Batcher) -> None:
    every = draw(batcher, model, 1, 50)
    assert [candidate.number for candidate in every.best] == list(range(50))
    ranked = sorted(every.best, key=lambda candidate: -candidate.score)
    best = draw(batcher, model, 1, 50, num_outputs=7)
    assert [candidate.number for candidate in best.best] == [candidate.number for candidate in ranked[:7]]


def test_candidates_of_an_interrupted_caller_are_dropped(
    model: FakeModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(batcher, model, 0, 4000, should_stop=lambda: calls.append(1))
    draw(batcher, model, 1)
    seen = len(calls)
    assert seen < LENGTH
    draw(batcher, model, 1)
    assert len(calls) == seen


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr("clip_gen.sampling.batcher.cpus", lambda: 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Watched(GPT):
    """Records how many threads torch uses in its steps."""

    threads: ClassVar[dict[int, set[int]]] = {}  # by width

    def step(self, last: Tensor | None, cache: KVCache) -> Tensor:
        self.threads.setdefault(self.config.n_embd, set()).add(torch.get_num_threads())
        return super().step(last, cache)


@pytest.mark.usefixtures("two_cpus")
def test_small_models_sample_on_one_thread_and_large_ones_on_all(threads: ThreadPoolExecutor) -> None:
    wide = replace(TINY.gpt, n_layer=1, n_embd=768, block_size=4)
    assert 4 * STANDARD_ROWS * wide.n_embd**2 > MIN_PRODUCT_FOR_THREADS
    batcher, small, large = Batcher(1e9), FakeModel(Watched(TINY.gpt).eval()), FakeModel(Watched(wide).eval())
    small.decode_threads = large.decode_threads = 2
    for future in [threads.submit(draw, batcher, model, number) for number, model in enumerate((small, large, small))]:
        future.result(30)
    assert Watched.threads == {TINY.gpt.n_embd: {1}, wide.n_embd: {2}}
    assert torch.get_num_threads() == threads.submit(torch.get_num_threads).result() == 2


@pytest.mark.usefixtures("two_cpus")
def test_prompts_and_pictures_use_the_threads_that_their_model_wants(batcher: Batcher) -> None:
    class Counting(FakeModel):
        def embed(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
            used.append(torch.get_num_threads())
            return super().embed(condition)

        def decode(self, *given: Tensor) -> list[tuple[Image.Image, float]]:
            used.append(torch.get_num_threads())
            return super().decode(*given)

    model = Counting(GPT(TINY.gpt).eval())
    for count in (1, 2):
        used: list[int] = []
        model.decode_threads = count
        draw(batcher, model, 1)
        assert used == [count, count]


@pytest.mark.usefixtures("two_cpus")
def test_threads_are_limited_to_the_cpus_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.sampling.batcher.cpus", lambda: 1)
    assert Batcher(1e9).max_threads == 1


@pytest.mark.usefixtures("two_cpus")
def test_loading_models_does_not_reduce_the_threads_of_a_batcher() -> None:
    def loading(inside: threading.Event, done: threading.Event) -> int:
        with one_thread():
            inside.set()
            assert done.wait(10)
            assert torch.get_num_threads() == 1
        return torch.get_num_threads()

    with ThreadPoolExecutor(3) as pool:
        events = [(threading.Event(), threading.Event()) for _ in range(2)]
        loads = [pool.submit(loading, *pair) for pair in events]
        for inside, _ in events:
            assert inside.wait(10)
        assert pool.submit(Batcher, 1e9).result(10).max_threads == 2
        for load, (_, done) in zip(loads, events, strict=True):
            done.set()
            assert load.result(10) == 2


def test_each_device_has_its_own_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 8e9, 1: 6e9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0], 80e9))
    monkeypatch.setattr("clip_gen.sampling.batcher._batchers", {})
    cpu = shared_batcher(torch.device("cpu"))
    first, second = shared_batcher(torch.device("cuda")), shared_batcher(torch.device("cuda:1"))
    assert (first.max_bytes, second.max_bytes) == (4e9, 3e9)
    assert shared_batcher(torch.device("cuda:0")) is first
    assert shared_batcher(torch.device("cpu")) is cpu


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_no_reference_to_a_model_stays_after_a_request(batcher: Batcher) -> None:
    model = FakeModel(GPT(TINY.gpt).eval())
    draw(batcher, model, 1)
    held = weakref.ref(model)
    del model
    deadline = time.monotonic() + 10
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert held() is None


def test_a_forked_child_has_a_batcher_of_its_own(model: FakeModel) -> None:
    cpu = torch.device("cpu")
    assert len(draw(shared_batcher(cpu), model, 1).best) == 2
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(len(draw(shared_batcher(cpu), model, 1, 5).best))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_bytes_are_those_of_the_cache_and_the_logits(dtype: torch.dtype) -> None:
    gpt = GPT(TINY.gpt).cast_for_inference(dtype)
    for passes, sampling in ((1, Sampling()), (2, Sampling(guidance=2.0))):
        cache = gpt.new_cache(torch.zeros(passes * 5, TINY.gpt.n_embd))
        logits = passes * 5 * TINY.gpt.codebook_size * 48
        assert batch_bytes(gpt, sampling, 5) == cache.keys.nbytes + cache.values.nbytes + logits


def test_queue_seconds_end_when_the_first_batch_of_a_request_starts(
    model: FakeModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded_at: list[float] = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *inputs: (decoded_at.append(time.monotonic()), decode(*inputs))[1])
    started = time.monotonic()
    large = draw(batcher, model, 1, 40 * STANDARD_ROWS).metrics
    assert large["queue_seconds"] + large["sampling_seconds"] <= time.monotonic() - started + 0.001
    assert large["queue_seconds"] < decoded_at[0] - started
    late = draw(batcher, model, 1, 1, asked_at=started).metrics
    assert late["queue_seconds"] > large["queue_seconds"]


def test_metrics_of_a_request(model: FakeModel, batcher: Batcher) -> None:
    metrics = draw(batcher, model, 1, 5).metrics
    assert metrics["rows_in_batch"] == 5
    assert 0 <= metrics["queue_seconds"] < 5
    assert metrics["sampling_seconds"] > 0
    assert metrics["tokens_per_second"] == pytest.approx(5 * LENGTH / metrics["sampling_seconds"], rel=0.1)
