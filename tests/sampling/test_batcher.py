"""batcher.py: several requests share a device, and none can tell."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from clip_gen.hardware import one_thread
from clip_gen.networks.gpt import GPT
from clip_gen.networks.kv_cache import KVCache
from clip_gen.sampling.batch_sizes import STANDARD_ROWS, max_candidates
from clip_gen.sampling.batcher import (
    MIN_PRODUCT_FOR_THREADS,
    Batcher,
    Busy,
    Sampled,
    batch_bytes,
    shared_batcher,
)
from clip_gen.sampling.sampler import Sampling, Stopped, candidate_uniforms, sample_tokens

LENGTH = TINY.gpt.block_size


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY.gpt).eval().requires_grad_(False)


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    made = Batcher(max_bytes=1e9)
    yield made
    made.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def embedding(number: int) -> torch.Tensor:
    return F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(number)), dim=-1)


def alone(gpt: GPT, number: int, candidates: int, sampling: Sampling) -> torch.Tensor:
    uniforms = candidate_uniforms(number, range(candidates), LENGTH)
    return sample_tokens(gpt, embedding(number).expand(candidates, -1), uniforms, sampling)


def ask(
    threads: ThreadPoolExecutor,
    batcher: Batcher,
    gpt: GPT,
    number: int,
    candidates: int = 2,
    sampling: Sampling = Sampling(),  # noqa: B008, frozen
    should_stop: Callable[[], bool] | None = None,
) -> Future[Sampled]:
    return threads.submit(batcher.sample, gpt, embedding(number), candidates, number, sampling, should_stop)


class Held:
    """Keeps the batcher's thread busy, so that what is asked meanwhile is all there when it goes on."""

    def __init__(self, batcher: Batcher, threads: ThreadPoolExecutor):
        self.batcher, self.threads, self.go_on = batcher, threads, threading.Event()

    def __enter__(self) -> None:
        held = threading.Event()
        self.threads.submit(self.batcher.run, lambda: (held.set(), self.go_on.wait(10)))
        assert held.wait(10)

    def __exit__(self, *_: object) -> None:
        wait_until_asked(self.batcher, 1)
        self.go_on.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for 10 seconds"
        time.sleep(0.001)


def wait_until_asked(batcher: Batcher, count: int) -> None:
    wait_until(lambda: batcher.waiting_requests >= count)


def test_every_request_gets_the_tokens_it_would_get_alone(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    settings = [Sampling(), Sampling(top_p=0.9, temperature=0.8), Sampling(guidance=3.0), Sampling()]
    wanted = [(number, 1 + 5 * number % 23, settings[number % 4]) for number in range(12)]
    asked = [ask(threads, batcher, gpt, *request) for request in wanted]
    for request, future in zip(wanted, asked, strict=True):
        assert torch.equal(future.result(30).tokens, alone(gpt, *request)), request


def test_those_who_ask_together_share_a_batch(gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor) -> None:
    with Held(batcher, threads):
        asked = [ask(threads, batcher, gpt, number, candidates=2) for number in range(8)]
        wait_until_asked(batcher, 8)
    assert [future.result(30).rows_in_batch for future in asked] == [16] * 8
    with Held(batcher, threads):
        asked = [ask(threads, batcher, gpt, number, sampling=Sampling(top_k=number)) for number in (1, 2)]
        wait_until_asked(batcher, 2)
    assert [future.result(30).rows_in_batch for future in asked] == [2, 2]


def test_requests_at_almost_the_same_time_share_a_batch_and_none_waits_for_ever(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(count: int) -> list[float]:
        asked = []
        for number in range(count):
            asked.append(ask(threads, batcher, gpt, number, candidates=2))
            time.sleep(0.1)
        return [future.result(30).rows_in_batch for future in asked]

    monkeypatch.setattr("clip_gen.sampling.batcher.WAIT_SECONDS", 1.0)
    monkeypatch.setattr("clip_gen.sampling.batcher.MAX_WAIT_SECONDS", 10.0)
    assert rows(4) == [8] * 4
    monkeypatch.setattr("clip_gen.sampling.batcher.MAX_WAIT_SECONDS", 0.25)
    assert max(rows(7)) < 14


def test_whose_prompt_was_being_read_still_shares_the_batch(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_gen.sampling.batcher.WAIT_SECONDS", 0.2)

    def read_and_ask(number: int) -> Sampled:
        batcher.run(
            lambda: time.sleep(0.25), before_sampling=True
        )  # longer than WAIT_SECONDS; all together longer than MAX_WAIT_SECONDS
        return batcher.sample(gpt, embedding(number), 2, number, Sampling())

    asked = [threads.submit(read_and_ask, number) for number in range(3)]
    assert [future.result(30).rows_in_batch for future in asked] == [6] * 3


def test_nobody_waits_for_calls_that_lead_up_to_nothing(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_gen.sampling.batcher.WAIT_SECONDS", 0.2)
    monkeypatch.setattr("clip_gen.sampling.batcher.MAX_WAIT_SECONDS", 10.0)
    asked = ask(threads, batcher, gpt, 1)
    deadline = time.monotonic() + 10
    while not asked.done():
        assert time.monotonic() < deadline
        batcher.run(lambda: time.sleep(0.02))  # as pictures of others are looked at
    assert asked.result().queue_seconds < 1


def test_a_request_joins_at_once_while_another_is_under_way(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    order, second = [], []

    def first_asked() -> bool:
        order.append("first")
        if len(order) == 4:
            second.append(ask(threads, batcher, gpt, 2, should_stop=lambda: order.append("second")))
            wait_until_asked(batcher, 1)
        return False

    first = ask(threads, batcher, gpt, 1, should_stop=first_asked)
    assert torch.equal(first.result(30).tokens, alone(gpt, 1, 2, Sampling()))
    assert torch.equal(second[0].result(30).tokens, alone(gpt, 2, 2, Sampling()))
    # From the next token on they take turns, until the first is done.
    assert order[4 : 4 + 10] == ["first", "second"] * 5 or order[5 : 5 + 10] == ["first", "second"] * 5
    assert second[0].result().queue_seconds < 1


def test_who_stops_leaves_within_a_token_and_the_others_never_notice(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    asked_at = []

    def stop() -> bool:
        asked_at.append(batcher.batches[0].length if batcher.batches else 0)
        return len(asked_at) > 5

    widths = []

    def watch() -> bool:
        widths.extend(batch.width for batch in batcher.batches)
        return False

    with Held(batcher, threads):
        stopped = ask(threads, batcher, gpt, 1, candidates=14, should_stop=stop)
        stays = ask(threads, batcher, gpt, 2, should_stop=watch)
        wait_until_asked(batcher, 2)
    with pytest.raises(Stopped):
        stopped.result(30)
    assert len(asked_at) == 6
    assert torch.equal(stays.result(30).tokens, alone(gpt, 2, 2, Sampling()))
    # Its rows are free within a token of its leaving.
    assert widths.count(16) <= 6
    assert set(widths) == {16, 2}
    alone_again = ask(threads, batcher, gpt, 3, should_stop=lambda: True)
    with pytest.raises(Stopped):
        alone_again.result(30)
    assert not batcher.batches


def test_a_full_queue_says_so_and_takes_more_later(gpt: GPT, threads: ThreadPoolExecutor) -> None:
    batcher = Batcher(max_bytes=0, max_waiting=20)
    with Held(batcher, threads):
        asked = [ask(threads, batcher, gpt, number, candidates=8) for number in (1, 2)]
        wait_until_asked(batcher, 2)
        with pytest.raises(Busy, match="16 candidates are waiting already and 8 more would pass 20; ask again"):
            batcher.sample(gpt, embedding(3), 8, 3, Sampling())
    for future in asked:
        future.result(30)
    assert batcher.sample(gpt, embedding(3), 40, 3, Sampling()).tokens.shape == (40, LENGTH)
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.sample(gpt, embedding(3), 1, 3, Sampling())


@pytest.mark.parametrize(("room", "batches"), [(0, 1), (1, 1), (2, 2), (100, 3)])
def test_no_more_batches_are_under_way_than_memory_has_room_for(
    gpt: GPT, threads: ThreadPoolExecutor, room: int, batches: int
) -> None:
    most = []
    batcher = Batcher(max_bytes=room * batch_bytes(gpt, Sampling(), max_candidates(gpt)))

    def watch() -> bool:
        most.append(len(batcher.batches))
        return False

    with Held(batcher, threads):
        full = max_candidates(gpt)
        asked = [ask(threads, batcher, gpt, number, full, should_stop=watch) for number in range(3)]
        wait_until_asked(batcher, 3)
    for number, future in enumerate(asked):
        assert torch.equal(future.result(30).tokens, alone(gpt, number, full, Sampling()))
    assert max(most) == batches
    batcher.close()


@pytest.mark.parametrize(("room", "larges"), [(0, 1), (1, 1), (2, 2), (100, 1)])
def test_a_small_request_does_not_wait_for_all_of_a_large_one(
    gpt: GPT, threads: ThreadPoolExecutor, room: int, larges: int
) -> None:
    batcher = Batcher(max_bytes=room * batch_bytes(gpt, Sampling(), max_candidates(gpt)))
    with Held(batcher, threads):
        large = [ask(threads, batcher, gpt, number, candidates=40 * STANDARD_ROWS) for number in range(larges)]
        wait_until_asked(batcher, larges)
        small = ask(threads, batcher, gpt, 7)
        wait_until_asked(batcher, larges + 1)
    assert torch.equal(small.result(30).tokens, alone(gpt, 7, 2, Sampling()))
    assert not any(future.done() for future in large)
    for number, future in enumerate(large):
        assert torch.equal(future.result(60).tokens, alone(gpt, number, 40 * STANDARD_ROWS, Sampling()))
    batcher.close()


def test_what_goes_wrong_with_one_request_leaves_the_thread_to_the_others(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    def broken() -> bool:
        raise KeyError("gone")

    with Held(batcher, threads):
        bad = ask(threads, batcher, gpt, 1, should_stop=broken)
        wait_until_asked(batcher, 1)
        good = ask(threads, batcher, gpt, 2)
        wait_until_asked(batcher, 2)
        worse = ask(threads, batcher, gpt, 3, should_stop=lambda: sys.exit("far gone"))
        wait_until_asked(batcher, 3)
    with pytest.raises(KeyError, match="gone"):
        bad.result(30)
    with pytest.raises(SystemExit, match="far gone"):
        worse.result(30)
    assert torch.equal(good.result(30).tokens, alone(gpt, 2, 2, Sampling()))
    with pytest.raises(ValueError, match=r"the embedding has shape \(1, 7\); this transformer takes \(1, 16\)"):
        batcher.sample(gpt, torch.zeros(1, 7), 1, 0, Sampling())
    with pytest.raises(SystemExit):
        batcher.run(lambda: sys.exit(3))
    assert batcher.run(lambda: 7) == 7


class EndsTheThread(GPT):
    def start(self, *_: object) -> torch.Tensor:
        raise SystemExit("far gone")


def test_nobody_waits_for_a_thread_that_is_gone() -> None:
    batcher = Batcher(max_bytes=1e9)
    with pytest.raises(SystemExit, match="far gone"):
        batcher.sample(EndsTheThread(TINY.gpt).eval(), embedding(1), 1, 1, Sampling())
    with pytest.raises(RuntimeError, match="closed"):
        batcher.run(lambda: 7)


def test_who_waits_for_a_call_hears_that_the_batcher_was_closed(threads: ThreadPoolExecutor) -> None:
    batcher, held, go_on = Batcher(max_bytes=1e9), threading.Event(), threading.Event()
    threads.submit(batcher.run, lambda: (held.set(), go_on.wait(10)))
    assert held.wait(10)
    asked = [threads.submit(batcher.share, list, range(3), 2), threads.submit(batcher.run, lambda: 7)]
    wait_until(lambda: batcher.waiting_calls == 4)
    closing = threads.submit(batcher.close)
    wait_until(lambda: batcher.closed)
    go_on.set()
    for future in asked:
        with pytest.raises(Stopped):
            future.result(10)
    closing.result(10)


def test_a_thread_that_broke_is_not_handed_out_again() -> None:
    cpu = torch.device("cpu")
    broken = shared_batcher(cpu)
    assert shared_batcher(cpu) is broken
    with pytest.raises(SystemExit, match="far gone"):
        broken.sample(EndsTheThread(TINY.gpt).eval(), embedding(1), 1, 1, Sampling())
    assert shared_batcher(cpu).run(lambda: 7) == 7


def test_who_draws_waits_for_one_call_at_a_time_and_for_prompts_that_are_read(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    drawn: dict[bool, list[int]] = {False: [], True: []}

    def call(before_sampling: bool) -> None:
        batcher.run(lambda: drawn[before_sampling].append(batcher.batches[0].length), before_sampling=before_sampling)

    def others_come() -> bool:
        if batcher.batches and batcher.batches[0].length == 3:
            for before_sampling in (False, False, False, True, True):
                threads.submit(call, before_sampling)
            wait_until(lambda: batcher.waiting_calls == 5)
        return False

    ask(threads, batcher, gpt, 1, should_stop=others_come).result(30)
    assert drawn == {False: [4, 5, 6], True: [4, 4]}


def test_rows_of_several_who_ask_for_the_same_work_are_done_together(
    batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    done: list[list[int]] = []

    def tenfold(rows: list[int]) -> list[int]:
        done.append(rows)
        if 13 in rows:
            raise ValueError("13 is not multiplied")
        return [10 * row for row in rows]

    def negative(rows: list[int]) -> list[int]:
        return [-row for row in rows]

    asked: list[Future] = []
    waiting = 0
    held, go_on = threading.Event(), threading.Event()
    threads.submit(batcher.run, lambda: (held.set(), go_on.wait(10)))
    assert held.wait(10)
    for work, rows in ((tenfold, [1, 2, 3]), (negative, [4, 5]), (tenfold, [6]), (tenfold, [7, 8]), (tenfold, [13, 9])):
        waiting += len(rows)
        asked.append(threads.submit(batcher.share, work, rows, 4))
        wait_until(lambda: batcher.waiting_calls == waiting)  # noqa: B023
    go_on.set()
    assert [future.result(10) for future in asked[:4]] == [[10, 20, 30], [-4, -5], [60], [70, 80]]
    with pytest.raises(ValueError, match="13 is not multiplied"):
        asked[4].result(10)
    assert done[:2] == [[1, 2, 3, 6], [7, 8, 13, 9]]
    assert done[2:6] == [[7], [8], [13], [9]]  # so that the others do not hear of it
    assert batcher.share(tenfold, [], 4) == []
    assert batcher.share(tenfold, range(5), 2) == [0, 10, 20, 30, 40]


def test_candidates_of_a_caller_who_was_interrupted_are_dropped(
    gpt: GPT, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def should_stop() -> bool:
        asked.append(1)
        return False

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batcher.sample(gpt, embedding(0), 4000, 0, Sampling(), should_stop)
    batcher.sample(gpt, embedding(1), 1, 1, Sampling())  # begins when the others are gone, or stand behind it
    seen = len(asked)
    batcher.sample(gpt, embedding(1), 1, 1, Sampling())
    assert len(asked) == seen


def test_what_failed_together_is_let_go_of_before_its_rows_are_tried_alone(batcher: Batcher) -> None:
    class Held(list):
        """A list that may be pointed at weakly."""

    held = []

    def work(rows: list[int]) -> list[int]:
        if held:
            assert held[0]() is None
            return rows
        much = Held(rows)
        held.append(weakref.ref(much))
        raise RuntimeError(f"no memory for {len(much)}")

    assert batcher.share(work, [1, 2], 2) == [1, 2]


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr("clip_gen.sampling.batcher.cpus", lambda: 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Watched(GPT):
    """Knows how many threads torch had when it drew."""

    threads: ClassVar[dict[int, set[int]]] = {}  # by width

    def step(self, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
        self.threads.setdefault(self.config.n_embd, set()).add(torch.get_num_threads())
        return super().step(token, cache)


@pytest.mark.usefixtures("two_cpus")
def test_small_models_are_drawn_on_one_thread_and_large_ones_on_all(threads: ThreadPoolExecutor) -> None:
    wide = replace(TINY.gpt, n_layer=1, n_embd=768, block_size=4)
    assert 4 * STANDARD_ROWS * wide.n_embd**2 > MIN_PRODUCT_FOR_THREADS
    batcher, small, large = Batcher(1e9), Watched(TINY.gpt).eval(), Watched(wide).eval()
    asked = [ask(threads, batcher, gpt, number) for number, gpt in enumerate((small, large, small))]
    for future in asked:
        future.result(30)
    assert Watched.threads == {TINY.gpt.n_embd: {1}, wide.n_embd: {2}}
    assert batcher.run(torch.get_num_threads) == batcher.run(torch.get_num_threads, 2) == 2
    assert batcher.run(torch.get_num_threads, 1) == batcher.share(lambda rows: [torch.get_num_threads()], [0], 1, 1)[0]
    assert torch.get_num_threads() == threads.submit(torch.get_num_threads).result() == 2
    batcher.close()


@pytest.mark.usefixtures("two_cpus")
def test_no_more_threads_draw_than_the_container_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_gen.sampling.batcher.cpus", lambda: 1)
    batcher = Batcher(1e9)
    assert batcher.run(torch.get_num_threads) == 1
    batcher.close()


@pytest.mark.usefixtures("two_cpus")
def test_it_has_all_cpus_whatever_is_being_loaded() -> None:
    def loading(inside: threading.Event, go_on: threading.Event) -> int:
        with one_thread():
            inside.set()
            assert go_on.wait(10)
            assert torch.get_num_threads() == 1
        return torch.get_num_threads()

    with ThreadPoolExecutor(3) as pool:
        events = [(threading.Event(), threading.Event()) for _ in range(2)]
        loads = [pool.submit(loading, *pair) for pair in events]
        for inside, _ in events:
            assert inside.wait(10)
        batcher = pool.submit(Batcher, 1e9).result(10)
        assert batcher.run(torch.get_num_threads) == 2
        batcher.close()
        for load, (_, go_on) in zip(loads, events, strict=True):
            go_on.set()
            assert load.result(10) == 2


def test_each_device_has_its_own_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {0: 8e9, 1: 6e9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0], 80e9))
    cpu = shared_batcher(torch.device("cpu"))
    first, second = shared_batcher(torch.device("cuda")), shared_batcher(torch.device("cuda:1"))
    assert (first.max_bytes, second.max_bytes) == (4e9, 3e9)
    assert shared_batcher(torch.device("cuda:0")) is first
    assert shared_batcher(torch.device("cpu")) is cpu
    for batcher in (first, second):
        batcher.close()


def test_an_idle_thread_holds_nothing(batcher: Batcher) -> None:
    gpt = GPT(TINY.gpt).eval()
    batcher.sample(gpt, embedding(1), 1, 1, Sampling())
    held = weakref.ref(gpt)
    del gpt
    deadline = time.monotonic() + 10
    while held() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert held() is None


def test_a_forked_child_has_a_batcher_of_its_own(gpt: GPT) -> None:
    cpu = torch.device("cpu")
    assert shared_batcher(cpu).run(lambda: 7) == 7
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(shared_batcher(cpu).run(lambda: 5))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_predicted_from_the_rows(dtype: torch.dtype) -> None:
    gpt = GPT(TINY.gpt).cast_for_inference(dtype)
    for passes, sampling in ((1, Sampling()), (2, Sampling(guidance=2.0))):
        cache = gpt.new_cache(passes * 5)
        logits = passes * 5 * TINY.gpt.codebook_size * 48
        assert batch_bytes(gpt, sampling, 5) == cache.keys.nbytes + cache.values.nbytes + logits


def test_an_error_reaches_those_whose_batch_it_was_and_nobody_else(
    gpt: GPT, batcher: Batcher, threads: ThreadPoolExecutor
) -> None:
    class Broken(GPT):
        def step(self, *_: object) -> torch.Tensor:
            raise RuntimeError("out of memory")

    broken = Broken(TINY.gpt).eval()
    bad, good = ask(threads, batcher, broken, 1), ask(threads, batcher, gpt, 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(30)
    assert torch.equal(good.result(30).tokens, alone(gpt, 2, 2, Sampling()))
    with pytest.raises(ValueError, match="no such thing"):
        batcher.run(lambda: (_ for _ in ()).throw(ValueError("no such thing")))
    assert batcher.run(lambda: 7) == 7


def test_queue_seconds_end_when_the_first_batch_of_a_request_starts(gpt: GPT, batcher: Batcher) -> None:
    started = time.monotonic()
    large = batcher.sample(gpt, embedding(1), 40 * STANDARD_ROWS, 1, Sampling())
    assert large.queue_seconds + large.sampling_seconds <= time.monotonic() - started
    assert large.queue_seconds < large.sampling_seconds / 4
    assert batcher.sample(gpt, embedding(1), 1, 1, Sampling(), waits_since=started).queue_seconds > large.queue_seconds


def test_metrics_tell_what_a_request_took(gpt: GPT, batcher: Batcher) -> None:
    metrics = batcher.sample(gpt, embedding(1), 5, 1, Sampling()).metrics
    assert metrics["rows_in_batch"] == 5
    assert 0 <= metrics["queue_seconds"] < 5
    assert metrics["sampling_seconds"] > 0
    speed = 5 * LENGTH / metrics["sampling_seconds"]
    assert metrics["tokens_per_second"] == pytest.approx(speed, rel=0.1)
