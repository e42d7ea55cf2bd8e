"""Puts candidates of several requests into common batches. One thread per device does all work on it.

A request's candidates join the next batch that starts, after at most MAX_WAIT_SECONDS in most cases. Several batches
may run at once: the thread samples a token of each in turn. On a CPU a candidate's bits do not depend on the other
candidates in its batch (batch_sizes.py).
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from clip_gen.hardware import available_memory, cpus, set_threads
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.batch_requests import Call, Request, RunningBatch, Sampled, run_calls
from clip_gen.sampling.batch_sizes import STANDARD_ROWS, max_candidates, padded_batch_size
from clip_gen.sampling.cuda_graphs import forget_idle
from clip_gen.sampling.sampler import Batch, Sampling, Stopped, candidate_uniforms, check_guidance

Row, Result = TypeVar("Row"), TypeVar("Result")

WAIT_SECONDS = 0.02  # after the last request, before a batch that is not full starts
MAX_WAIT_SECONDS = 0.1  # after the first request; ten times as long while prompts of others are embedded
# Multiply-adds in a transformer's largest product with STANDARD_ROWS rows, from which several threads are used. Threads
# wait for each other after every operation: for milliseconds if other processes use the CPUs. Below this (width 512,
# say) two threads are hardly faster than one on an idle machine, and far slower on a busy one.
MIN_PRODUCT_FOR_THREADS = 2**25


class Busy(RuntimeError):
    """Too many candidates are waiting."""


class Batcher:
    """All methods may be called from any thread. They block until the result is there.

    max_bytes: of all running batches together, by `batch_bytes`. One batch always runs. On a GPU idle CUDA graphs count
    too, and are deleted if they leave no room. max_waiting: candidates that may wait; more raise Busy.
    """

    def __init__(self, max_bytes: float, max_waiting: int = 4096):
        self.max_bytes, self.max_waiting = max_bytes, max_waiting
        self.max_threads = min(torch.get_num_threads(), cpus())  # for torch's work on large models
        self._waiting: deque[Request] = deque()
        self._calls: list[Call] = []
        self._running: list[RunningBatch] = []
        self._prompt_embedded_at = 0.0  # when the last call with before_sampling ended
        self._changed = threading.Condition()
        self._closed = False
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
        """The tokens of the first `candidates` candidates of a seed, for one embedding (1, E).

        waits_since: when the caller began to wait, by time.monotonic(); None: now. Raises Stopped, within a token, if
        should_stop returns True; Busy if too many candidates wait; ValueError for an embedding of the wrong shape, and
        for guidance with a model that has no null condition.
        """
        check_guidance(gpt, sampling)
        shape = (1, gpt.config.embed_dim)
        if embedding.shape != shape:  # in a batch it would fail the other requests too
            raise ValueError(f"the embedding has shape {tuple(embedding.shape)}; this transformer takes {shape}")
        uniforms = candidate_uniforms(seed, range(candidates), gpt.config.block_size)
        with torch.inference_mode(False):  # the batcher's thread could not write to an inference tensor
            tokens = torch.empty(uniforms.shape, dtype=torch.long)
        since = time.monotonic() if waits_since is None else waits_since
        request = Request(gpt, embedding, uniforms, sampling, should_stop, since, tokens)
        with self._changed:
            self._check_open()
            self._check_room(candidates)
            self._waiting.append(request)
            self._changed.notify()
        try:
            return request.result.result()
        except BaseException:  # such as KeyboardInterrupt in this thread
            request.interrupted = True
            raise

    def run(self, work: Callable[[], Result], threads: int | None = None, before_sampling: bool = False) -> Result:
        """Runs `work` in the batcher's thread, between two tokens.

        threads: for torch; None: max_threads. before_sampling: the caller will call `sample` next, so the next batch
        waits for it.
        """
        return self._submit([Call(work, threads or self.max_threads, before_sampling)])[0]

    def share(
        self, work: Callable[[list[Row]], list[Result]], rows: Iterable[Row], max_rows: int, threads: int | None = None
    ) -> list[Result]:
        """Runs `work` on these rows like `run`, up to max_rows at a time, together with rows of other callers.

        An error reaches only the callers whose rows fail alone too.
        """
        return self._submit([Call(work, threads or self.max_threads, row=row, max_rows=max_rows) for row in rows])

    def threads_for(self, gpt: GPT) -> int:
        """How many threads sample with this transformer: 1 for a small one, else max_threads.

        It never depends on the load: the number of threads may change the last bits of a sum, and so a seed's picture.
        """
        return self.max_threads if 4 * STANDARD_ROWS * gpt.config.n_embd**2 >= MIN_PRODUCT_FOR_THREADS else 1

    @property
    def waiting_requests(self) -> int:
        """Requests with candidates that are in no batch yet."""
        with self._changed:
            return sum(request.waiting_rows > 0 for request in self._waiting)

    @property
    def waiting_calls(self) -> int:
        """Calls of `run`, and rows of `share`, that have not begun."""
        with self._changed:
            return len(self._calls)

    @property
    def batches(self) -> list[Batch]:
        """The running batches, oldest first."""
        return [running.batch for running in self._running]

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests, after `close` or an error of its thread."""
        return self._closed

    def close(self) -> None:
        """Ends the thread. Unfinished requests and calls raise Stopped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _submit(self, calls: list[Call]) -> list[Any]:
        with self._changed:
            self._check_open()
            self._calls += calls
            self._changed.notify()
        return [call.result.result() for call in calls]

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this batcher is closed")

    def _check_room(self, candidates: int) -> None:
        waiting = sum(request.waiting_rows for request in self._waiting)
        if waiting and waiting + candidates > self.max_waiting:  # a single request may be of any size
            raise Busy(
                f"{waiting} candidates are waiting already and {candidates} more would pass {self.max_waiting}; "
                "ask again in a while"
            )

    # From here on: the batcher's own thread.

    def _work(self) -> None:
        error: BaseException = Stopped()
        try:
            while self._work_once():
                pass
        except BaseException as unexpected:  # without this, callers would wait forever
            error = unexpected
        with self._changed:
            self._closed = True
            results = [call.result for call in self._calls] + [request.result for request in self._requests()]
            self._running = []
        for result in results:
            if not result.done():
                result.set_exception(error)

    def _work_once(self) -> bool:
        """Runs calls, then samples a token of every batch; returns False when closed.

        A method of its own, so that an idle thread holds no references to finished work.
        """
        with self._changed:
            while not (self._calls or self._running or self._closed) and (seconds := self._seconds_to_wait()) != 0:
                self._changed.wait(seconds)
            if self._closed:
                return False
            calls = self._next_calls()
        for joined in calls:
            set_threads(joined[0].threads)
            run_calls(joined)
            if joined[0].before_sampling:
                self._prompt_embedded_at = time.monotonic()
        self._drop_stopped()
        self._start_batches()
        for running in self._running:
            self._step(running)
        self._running = [running for running in self._running if running.wanted]
        return True

    def _next_calls(self) -> list[list[Call]]:
        """Calls to run before the next token, those of a list together: all with before_sampling, which are short, and
        the first other one with those that join it.
        """
        prompts = [[call] for call in self._calls if call.before_sampling]
        others = [call for call in self._calls if not call.before_sampling]
        if not others:
            self._calls = []
            return prompts
        first = others[0]
        joined = [first, *(call for call in others[1:] if call.joins(first))][: first.max_rows or 1]
        self._calls = [call for call in others if call not in joined]
        return [*prompts, joined]

    def _requests(self) -> set[Request]:
        return set(self._waiting).union(*(running.requests for running in self._running))

    def _ready_requests(self) -> list[Request]:
        """Waiting requests without a running batch. A large request runs one batch at a time, so that small requests
        need not wait for all of it.
        """
        served = set().union(*(running.requests for running in self._running))
        return [request for request in self._waiting if request.waiting_rows and request not in served]

    def _seconds_to_wait(self) -> float | None:
        """Until the next batch may start; None: until there is a request."""
        ready = self._ready_requests()
        if not ready:
            return None
        first = ready[0]
        set_threads(self.threads_for(first.gpt))  # max_candidates may test products
        joined = [request for request in ready if request.can_share_batch(first)]
        if sum(request.waiting_rows for request in joined) >= max_candidates(first.gpt):
            return 0
        asked = [request.asked_at for request in joined]
        waited = min(max(asked) + WAIT_SECONDS, min(asked) + MAX_WAIT_SECONDS)
        # Callers whose prompts were just embedded are about to ask, however long that took.
        prompts = min(self._prompt_embedded_at + WAIT_SECONDS, min(asked) + 10 * MAX_WAIT_SECONDS)
        return max(0, max(waited, prompts) - time.monotonic())

    def _drop_stopped(self) -> None:
        for request in self._requests():
            request.check_stop()
        self._running = [running for running in self._running if running.wanted]

    def _start_batches(self) -> None:
        """Starts batches while candidates wait and memory allows, first come, first served."""
        if not self._waiting:
            return
        used = sum(batch_bytes(batch.gpt, batch.sampling, batch.width) for batch in self.batches)
        while True:
            with self._changed:
                self._waiting = deque(request for request in self._waiting if request.waiting_rows)
                if self._seconds_to_wait() != 0:
                    return
                ready = self._ready_requests()
            gpt, sampling = ready[0].gpt, ready[0].sampling
            used += batch_bytes(gpt, sampling, max_candidates(gpt))
            if self._running and used > self.max_bytes:
                return
            rows = self._take_rows(ready)
            size = sampling.passes * padded_batch_size(gpt, len(rows), sampling.passes)
            forget_idle(self.max_bytes - used, gpt, size)
            self._start_batch(rows)

    def _take_rows(self, ready: list[Request]) -> list[tuple[Request, int]]:
        """The rows of the next batch: of the first request, and of others that can share a batch with it."""
        rows: list[tuple[Request, int]] = []
        for request in ready:
            if request.can_share_batch(ready[0]):
                rows += request.start_rows(min(max_candidates(request.gpt) - len(rows), request.waiting_rows))
        started = {request for request, _ in rows}
        with self._changed:  # requests with more candidates than fit go behind those that have no batch yet
            self._waiting = deque(sorted(self._waiting, key=started.__contains__))
        return rows

    def _start_batch(self, rows: list[tuple[Request, int]]) -> None:
        requests = {request for request, _ in rows}
        for request in requests:
            request.batch_rows.append(len(rows))
        gpt, sampling = rows[0][0].gpt, rows[0][0].sampling
        set_threads(self.threads_for(gpt))
        try:
            embedding = torch.cat([request.embedding for request, _ in rows])
            uniforms = torch.stack([request.uniforms[i] for request, i in rows])
            self._running.append(RunningBatch(Batch(gpt, embedding, uniforms, sampling), rows))
        except Exception as error:  # only these requests get it
            for request in requests:
                request.fail(error)

    def _step(self, running: RunningBatch) -> None:
        set_threads(self.threads_for(running.batch.gpt))
        try:
            running.step()
        except Exception as error:  # only these requests get it
            for request in running.requests:
                request.fail(error)


def batch_bytes(gpt: GPT, sampling: Sampling, candidates: int) -> int:
    """An upper bound of a batch's memory: keys and values of every layer; logits and the tensors computed from them."""
    config = gpt.config
    cache = 2 * config.n_layer * config.block_size * config.n_embd * gpt.cache_dtype.itemsize
    logits = 12 * config.codebook_size * 4
    return candidates * (cache + logits) * sampling.passes


# By process: a forked child has neither its parent's threads nor anyone to release its parent's lock.
_locks: dict[int, threading.Lock] = {}
_batchers: dict[tuple[int, str, int], Batcher] = {}


def shared_batcher(device: torch.device) -> Batcher:
    """The batcher of this process and device, made on the first call with half of the free memory.

    Also makes one if the last one's thread ended.
    """
    process = os.getpid()
    key = process, device.type, device.index or 0
    with _locks.setdefault(process, threading.Lock()):
        batcher = _batchers.get(key)
        if batcher is None or batcher.closed:
            batcher = _batchers[key] = Batcher(available_memory(device) / 2)
            atexit.register(batcher.close)  # a thread that ends inside torch would abort the process
        return batcher
