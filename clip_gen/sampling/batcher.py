"""Several requests, one device: their candidates share batches, and one thread per device does all the work.

A request's candidates join the next batch that starts, mostly within LONGEST, beside whatever others have under way;
every batch is worked on in turn, a token each. Its matrix products have a number of rows that gives each row the same
bits as others do (sampling.NUMBERS), so on a CPU a candidate is the same whoever else asks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from clip_gen.hardware import available_memory, cpus, set_threads
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.cuda_graphs import forget_idle
from clip_gen.sampling.sampler import (
    ROWS,
    Batch,
    Sampling,
    Stopped,
    candidate_uniforms,
    check_guidance,
    most_rows,
    rows_of,
)

Row, Result = TypeVar("Row"), TypeVar("Result")

LINGER = 0.02  # seconds that candidates which do not fill a batch wait for others to share it, from the last to come
LONGEST = 0.1  # and from the first; ten times that while others' prompts are being read
# Multiply-adds in a transformer's largest product for ROWS candidates, from which several threads pay. Threads wait for
# each other after every operation; beside other processes that takes milliseconds, whenever one of them has no CPU.
# Width 512 is below: there two threads are hardly faster than one on a quiet machine, and far slower beside others.
SHARED_PRODUCT = 2**25


class Busy(RuntimeError):
    """More is asked for than may wait."""


@dataclass(frozen=True)
class Sampled:
    """What a request was given, and what it took."""

    tokens: Tensor  # (candidates, T)
    queue_seconds: float  # until its first candidates were begun
    sampling_seconds: float  # from its first token to its last
    rows_in_batch: float  # candidates, its own and others', in its batches; the mean over them

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "queue_seconds": round(self.queue_seconds, 4),
            "sampling_seconds": round(self.sampling_seconds, 4),
            "tokens_per_second": round(self.tokens.numel() / max(self.sampling_seconds, 1e-6), 1),
            "rows_in_batch": round(self.rows_in_batch, 2),
        }


@dataclass(eq=False)
class _Call:
    """Work for the thread that has the device."""

    work: Callable
    threads: int
    leads_up: bool = False
    row: object = None
    most: int = 0  # rows that the work takes at a time; 0 for what takes none
    result: Future = field(default_factory=Future)


@dataclass(eq=False)
class _Request:
    gpt: GPT
    embedding: Tensor  # (1, E)
    uniforms: Tensor  # (candidates, T)
    sampling: Sampling
    should_stop: Callable[[], bool]
    waits_since: float
    tokens: Tensor  # (candidates, T), filled in as batches end
    result: Future = field(default_factory=Future)
    given_up: bool = False
    begun_rows: int = 0
    ended_rows: int = 0
    asked: float = field(default_factory=time.monotonic)
    first_begun: float = 0.0
    batch_rows: list[int] = field(default_factory=list)  # in each of its batches, its own and others'

    @property
    def waiting_rows(self) -> int:
        return 0 if self.result.done() else len(self.uniforms) - self.begun_rows

    def shares_with(self, other: _Request) -> bool:
        """What is drawn by other settings, or by another model, takes another batch."""
        return self.gpt is other.gpt and self.sampling == other.sampling


@dataclass(eq=False)
class _UnderWay:
    """A batch under way, and whose its rows are."""

    batch: Batch
    rows: list[tuple[_Request, int]]  # the request and which of its candidates

    @property
    def wanted(self) -> bool:
        return not self.batch.done and any(not request.result.done() for request, _ in self.rows)

    def free_rows(self) -> None:
        """Goes on without the rows that nobody waits for any more, once they are a quarter."""
        wanted = [row for row, (request, _) in enumerate(self.rows) if not request.result.done()]
        if len(wanted) == len(self.rows):
            return
        with contextlib.suppress(RuntimeError):  # no memory for the smaller beside the larger: it goes on as it is
            if self.batch.keep(wanted):
                self.rows = [self.rows[row] for row in wanted]


class Batcher:
    """Give it requests from any thread; it blocks each until its own is done.

    most_bytes: what the batches under way may hold together by batch_bytes, of which there is always one; more wait
    their turn. On a GPU recordings kept for batches to come count too, and go where they leave no room. most_waiting:
    candidates that may wait; Busy beyond.

    most_threads: for torch's work on large models, as many as torch has in the thread that makes the batcher, and no
    more than there are CPUs.
    """

    def __init__(self, most_bytes: float, most_waiting: int = 4096):
        self.most_bytes, self.most_waiting = most_bytes, most_waiting
        self._asked: deque[_Request] = deque()
        self._calls: list[_Call] = []
        self._under_way: list[_UnderWay] = []
        self._led_up = 0.0  # when the last call was over whose caller is about to ask for candidates
        self._news = threading.Condition()
        self._closed = False
        self.most_threads = min(torch.get_num_threads(), cpus())
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def sample(
        self,
        gpt: GPT,
        embedding: Tensor,
        candidates: int,
        seed: int,
        sampling: Sampling,
        should_stop: Callable[[], bool] | None = None,
        waits_since: float | None = None,
    ) -> Sampled:
        """The tokens of the first `candidates` candidates of a seed for one embedding (1, E).

        waits_since: by time.monotonic(), when who asks began to wait for the device; now, if not given.
        Stopped within a token of should_stop saying so; Busy when too many wait already; ValueError for guidance by a
        transformer without a null condition.
        """
        check_guidance(gpt, sampling)
        wanted = (1, gpt.config.embed_dim)
        if embedding.shape != wanted:  # in a batch it would be the neighbours' trouble too
            raise ValueError(f"the embedding has shape {tuple(embedding.shape)}; this transformer takes {wanted}")
        uniforms = candidate_uniforms(seed, range(candidates), gpt.config.block_size)
        with torch.inference_mode(False):  # of an asker who is in it the other thread could not fill them in
            tokens = torch.empty(uniforms.shape, dtype=torch.long)
        since = time.monotonic() if waits_since is None else waits_since
        request = _Request(gpt, embedding, uniforms, sampling, should_stop or (lambda: False), since, tokens)
        with self._news:
            self._check_open()
            waiting = sum(other.waiting_rows for other in self._asked)
            # One alone may be as large as it likes.
            if waiting and waiting + candidates > self.most_waiting:
                raise Busy(
                    f"{waiting} candidates are waiting already and {candidates} more would pass {self.most_waiting}; "
                    "ask again in a while"
                )
            self._asked.append(request)
            self._news.notify()
        try:
            return request.result.result()
        except BaseException:  # whoever waits was interrupted, or hears of an error
            request.given_up = True
            raise

    def threads_for(self, gpt: GPT) -> int:
        """How many threads draw with this transformer: one with a small transformer, else most_threads. The load never
        decides: the number of threads can change the last bits of a sum, and a seed's picture must stay the same.
        """
        return self.most_threads if 4 * ROWS * gpt.config.n_embd**2 >= SHARED_PRODUCT else 1

    def run(self, work: Callable[[], Result], threads: int | None = None, leads_up: bool = False) -> Result:
        """What `work` returns, done between two tokens by the thread that has the device.

        threads: how many torch may use for it; most_threads if not given. leads_up: the caller will ask for candidates
        next, and is worth waiting for.
        """
        return self._called([_Call(work, threads or self.most_threads, leads_up)])[0]

    def share(
        self, work: Callable[[list[Row]], list[Result]], rows: Iterable[Row], most: int, threads: int | None = None
    ) -> list[Result]:
        """What `work` makes of these rows, done as by `run`, `most` of them at a time; with fewer left, those of others
        who ask for the same work are done along with them. Each row alone once they fail together: an error is for
        those to hear of whose row it was.
        """
        return self._called([_Call(work, threads or self.most_threads, row=row, most=most) for row in rows])

    def _called(self, calls: list[_Call]) -> list[Any]:
        with self._news:
            self._check_open()
            self._calls += calls
            self._news.notify()
        return [call.result.result() for call in calls]

    @property
    def waiting_requests(self) -> int:
        """Requests with candidates that are in no batch yet."""
        with self._news:
            return sum(request.waiting_rows > 0 for request in self._asked)

    @property
    def waiting_calls(self) -> int:
        """Calls of `run`, and rows given to `share`, that the thread has not begun."""
        with self._news:
            return len(self._calls)

    @property
    def batches(self) -> list[Batch]:
        """Those under way, the oldest first."""
        return [shared.batch for shared in self._under_way]

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: by `close`, or since its thread broke."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this batcher is closed")

    def close(self) -> None:
        """Ends the thread; what is under way is Stopped."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join()

    def _work(self) -> None:
        error: BaseException = Stopped()
        try:
            while self._round():
                pass
        except BaseException as unforeseen:  # nobody may wait for a thread that is gone
            error = unforeseen
        with self._news:
            self._closed = True
            waiting = [call.result for call in self._calls]
            waiting += [request.result for request in self._requests()]
            self._under_way = []
        for result in waiting:
            if not result.done():
                result.set_exception(error)

    def _round(self) -> bool:
        """Calls, then a token of every batch; False when closed. Its locals die with it, and what they hold."""
        with self._news:
            while not (self._calls or self._under_way or self._closed) and (patience := self._patience()) != 0:
                self._news.wait(patience)
            if self._closed:
                return False
            calls = self._next_calls()
        for together in calls:
            set_threads(together[0].threads)
            _fulfil(together)
            if together[0].leads_up:
                self._led_up = time.monotonic()
        self._drop_stopped()
        self._begin()
        for shared in self._under_way:
            self._step(shared)
        self._under_way = [shared for shared in self._under_way if shared.wanted]
        return True

    def _next_calls(self) -> list[list[_Call]]:
        """Those that come before the next token, of which those in one list are done in one: all that lead up to more,
        which are short, and of the others the first.
        """
        others = [call for call in self._calls if not call.leads_up]
        first = others[:1]
        if first and first[0].most:
            kind = first[0].work, first[0].most
            first = [call for call in others if (call.work, call.most) == kind][: first[0].most]
        leading = [[call] for call in self._calls if call.leads_up]
        self._calls = [call for call in others if call not in first]
        return leading + ([first] if first else [])

    def _requests(self) -> set[_Request]:
        return {request for shared in self._under_way for request, _ in shared.rows} | set(self._asked)

    def _ready(self) -> list[_Request]:
        """Those that wait and have no batch under way: a large request takes its batches one after another, or a small
        one beside it would wait for all of them."""
        served = {request for shared in self._under_way for request, _ in shared.rows}
        return [request for request in self._asked if request.waiting_rows and request not in served]

    def _patience(self) -> float | None:
        """Seconds to wait before the next batch may begin; None for as long as nobody asks."""
        ready = self._ready()
        if not ready:
            return None
        set_threads(self.threads_for(ready[0].gpt))  # most_rows may have to find out how products round
        together = [request for request in ready if request.shares_with(ready[0])]
        if sum(request.waiting_rows for request in together) >= most_rows(ready[0].gpt):
            return 0
        asked = [request.asked for request in together]
        first, last = min(asked), max(asked)
        # Others whose prompts were being read could not come sooner, however long that took.
        until = max(min(last + LINGER, first + LONGEST), min(self._led_up + LINGER, first + 10 * LONGEST))
        return max(0, until - time.monotonic())

    def _drop_stopped(self) -> None:
        for request in self._requests():
            if request.result.done():
                continue
            try:
                stopped = request.given_up or request.should_stop()
            except BaseException as error:  # the request's to hear of, whatever it is
                request.result.set_exception(error)
            else:
                if stopped:
                    request.result.set_exception(Stopped())
        self._under_way = [shared for shared in self._under_way if shared.wanted]
        for shared in self._under_way:
            shared.free_rows()

    def _begin(self) -> None:
        """Puts candidates that wait into new batches, first come first served, as far as there is room."""
        if not self._asked:
            return
        held = sum(batch_bytes(batch.gpt, batch.sampling, batch.width) for batch in self.batches)
        while True:
            with self._news:
                self._asked = deque(request for request in self._asked if request.waiting_rows)
                if self._patience() != 0:
                    return
                ready = self._ready()
            first = ready[0]
            held += batch_bytes(first.gpt, first.sampling, most_rows(first.gpt))
            if self._under_way and held > self.most_bytes:
                return
            rows: list[tuple[_Request, int]] = []
            for request in ready:
                if request.shares_with(first):
                    taken = min(most_rows(first.gpt) - len(rows), request.waiting_rows)
                    rows += [(request, request.begun_rows + i) for i in range(taken)]
                    request.begun_rows += taken
            begun = {request for request, _ in rows}
            with self._news:  # who has more than a batch of candidates goes behind those who have none yet
                self._asked = deque(sorted(self._asked, key=begun.__contains__))
            passes = first.sampling.passes
            forget_idle(self.most_bytes - held, first.gpt, passes * rows_of(first.gpt, len(rows), passes))
            self._start(rows)

    def _start(self, rows: list[tuple[_Request, int]]) -> None:
        first = rows[0][0]
        now = time.monotonic()
        for request, _ in rows:
            request.first_begun = request.first_begun or now
        for request in {request for request, _ in rows}:
            request.batch_rows.append(len(rows))
        set_threads(self.threads_for(first.gpt))
        try:
            embedding = torch.cat([request.embedding for request, _ in rows])
            uniforms = torch.stack([request.uniforms[i] for request, i in rows])
            self._under_way.append(_UnderWay(Batch(first.gpt, embedding, uniforms, first.sampling), rows))
        except Exception as error:  # the requests' to hear of; the thread goes on for the others
            _fail(rows, error)

    def _step(self, shared: _UnderWay) -> None:
        set_threads(self.threads_for(shared.batch.gpt))
        try:
            shared.batch.step()
            if shared.batch.done:
                self._deliver(shared)
        except Exception as error:
            _fail(shared.rows, error)

    def _deliver(self, shared: _UnderWay) -> None:
        for (request, candidate), tokens in zip(shared.rows, shared.batch.tokens.cpu(), strict=True):
            request.tokens[candidate] = tokens
            request.ended_rows += 1
            if request.ended_rows == len(request.uniforms) and not request.result.done():
                request.result.set_result(
                    Sampled(
                        request.tokens.to(request.embedding.device),
                        request.first_begun - request.waits_since,
                        time.monotonic() - request.first_begun,
                        sum(request.batch_rows) / len(request.batch_rows),
                    )
                )


def batch_bytes(gpt: GPT, sampling: Sampling, rows: int) -> int:
    """What a batch holds, at most: keys and values of every layer, and logits with what they are turned into."""
    config = gpt.config
    cache = 2 * config.n_layer * config.block_size * config.n_embd * gpt.cache_dtype.itemsize
    logits = 12 * config.codebook_size * 4
    return rows * (cache + logits) * sampling.passes


_making = threading.Lock()
_shared: dict[tuple[str, int], Batcher] = {}


def shared_batcher(device: torch.device) -> Batcher:
    """The batcher that all requests of this process for this device go through. The first request makes it, with half
    the device's free memory; so does the next one if the batcher's thread broke.
    """
    key = device.type, device.index or 0
    with _making:
        batcher = _shared.get(key)
        if batcher is None or batcher.closed:
            batcher = _shared[key] = Batcher(available_memory(device) / 2)
            atexit.register(batcher.close)  # a thread cut off inside torch would abort the process
        return batcher


def _forget() -> None:
    """A forked child has no thread behind the batchers, and none that would release the lock."""
    global _making
    _making = threading.Lock()
    _shared.clear()


os.register_at_fork(after_in_child=_forget)


def _fail(rows: list[tuple[_Request, int]], error: Exception) -> None:
    for request in {request for request, _ in rows}:
        if not request.result.done():
            request.result.set_exception(error)


def _fulfil(calls: list[_Call]) -> None:
    first = calls[0]
    try:
        found = first.work([call.row for call in calls]) if first.most else [first.work()]
    except BaseException as error:  # theirs to hear of, whatever it is
        if len(calls) == 1:
            first.result.set_exception(error)
            return
    else:
        for call, answer in zip(calls, found, strict=True):
            call.result.set_result(answer)
        return
    for call in calls:  # out here nothing holds on to what all of them together took
        _fulfil([call])
