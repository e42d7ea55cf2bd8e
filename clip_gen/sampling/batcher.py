"""Puts candidates of several requests into common batches. One thread per device does all work on it.

A request's candidates join the next batch that starts, after at most MAX_WAIT_SECONDS. Several batches may run at once:
the thread samples a token of each in turn. On a CPU a candidate's bits do not depend on the other candidates in its
batch (batch_sizes.py).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from PIL import Image

from clip_gen.hardware import available_memory, cpus, set_threads
from clip_gen.networks.gpt import GPT
from clip_gen.sampling.batch_requests import Candidate, Request, RunningBatch, errors_to
from clip_gen.sampling.batch_sizes import STANDARD_ROWS, max_candidates, padded_batch_size
from clip_gen.sampling.cuda_graphs import forget_idle
from clip_gen.sampling.sampler import Batch, Sampling, Stopped

WAIT_SECONDS = 0.02  # after the last request, before a batch that is not full starts
MAX_WAIT_SECONDS = 0.1  # after the first request
POLL_SECONDS = 0.002
PREVIEW_SHARE = 0.05  # of the time, at most, goes into previews
# Multiply-adds in a transformer's largest product with STANDARD_ROWS rows, from which several threads are used. Threads
# wait for each other after every operation: for milliseconds if other processes use the CPUs. Below this (width 512,
# say) two threads are hardly faster than one on an idle machine, and far slower on a busy one.
MIN_PRODUCT_FOR_THREADS = 2**25


class Batcher:
    """Draws requests of any threads, in a thread of its own.

    max_bytes: of all running batches together, by `batch_bytes`. One batch always runs. On a GPU idle CUDA graphs count
    too, and are deleted if they leave no room.
    """

    def __init__(self, max_bytes: float):
        self.max_bytes = max_bytes
        self.max_threads = min(torch.get_num_threads(), cpus())  # for torch's work on large models
        self._calls: SimpleQueue[tuple[Callable[[], object], Future]] = SimpleQueue()  # for the thread
        self._closed = False
        self._arrived: deque[Request] = deque()  # from other threads
        self._requests: list[Request] = []  # that have not ended, first those to be served first
        self._running: list[RunningBatch] = []
        self._sampled: list[Candidate] = []  # but not decoded
        self._next_preview = 0.0  # not before, in CPU seconds of the thread
        # Not an executor: those refuse work, and wait for all of theirs, as soon as the main thread has ended.
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def draw(self, request: Request) -> list[Candidate]:
        """The request's candidates, or the best of them, decoded.

        Raises Stopped, within a token, once should_stop returns True; ValueError for guidance without a negative
        embedding with a model that has no null condition.
        """
        self._arrived.append(request)
        self.submit(self._work)
        if self._closed:
            request.fail(Stopped())
        try:
            if request.listener is not None:
                request.listener.listen(request.result)
            return request.result.result()
        finally:
            request.result.cancel()  # matters only if this thread is interrupted, as by Ctrl-C

    def submit(self, work: Callable[[], object]) -> Future:
        """Runs `work` in the batcher's thread when no request is left."""
        result: Future = Future()
        self._calls.put((work, result))
        return result

    def close(self) -> None:
        """Ends the thread within a token. Unfinished requests raise Stopped."""
        self._closed = True
        if self._thread.is_alive():  # a forked child has only the object
            self.submit(int)  # wakes an idle thread
            self._thread.join()
        for request in [*self._requests, *self._arrived]:
            request.fail(Stopped())

    def threads_for(self, gpt: GPT) -> int:
        """How many threads sample with this transformer: 1 for a small one, else max_threads.

        It never depends on the load: the number of threads may change the last bits of a sum, and so a seed's picture.
        """
        return self.max_threads if 4 * STANDARD_ROWS * gpt.config.n_embd**2 >= MIN_PRODUCT_FOR_THREADS else 1

    @property
    def batches(self) -> list[Batch]:
        """The running batches, oldest first."""
        return [running.batch for running in self._running]

    # From here on: the batcher's own thread.

    def _run(self) -> None:
        while not self._closed:
            self._call(*self._calls.get())

    def _call(self, work: Callable[[], object], result: Future) -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    def _work(self) -> None:
        """Draws until no request is left, those included that arrive meanwhile."""
        while (self._arrived or self._requests) and not self._closed:
            with errors_to(self._requests):
                self._embed_conditions()
                for request in self._requests:
                    request.check_stop()
                self._start_batches()
                self._decode()
                self._sample()
                self._report()
            self._drop_ended()
            if self._requests and not self._running and not self._sampled:
                time.sleep(POLL_SECONDS)  # more requests may join the next batch

    def _embed_conditions(self) -> None:
        while self._arrived:
            request = self._arrived.popleft()
            self._requests.append(request)
            with errors_to([request]):
                set_threads(request.model.decode_threads)
                request.embedding, request.negative = request.model.embed(request.condition)
                request.conditions = request.model.conditions(request)
                if request.inpainting is not None:
                    request.kept = request.model.kept_tokens(request.inpainting)

    def _start_batches(self) -> None:
        """Starts batches while candidates wait and memory allows, first come, first served."""
        while requests := self._next_requests():
            gpt, sampling = requests[0].model.gpt, requests[0].sampling
            used = sum(batch_bytes(batch.gpt, batch.sampling, batch.width) for batch in self.batches)
            used += batch_bytes(gpt, sampling, max_candidates(gpt))
            if self._running and used > self.max_bytes:
                return
            candidates: list[Candidate] = []
            for request in requests:
                candidates += request.start(max_candidates(gpt) - len(candidates))
            served = {candidate.request for candidate in candidates}
            # Requests with more candidates than fit go behind those that have no batch yet.
            self._requests.sort(key=served.__contains__)
            with errors_to(served):
                size = sampling.passes * padded_batch_size(gpt, len(candidates), sampling.passes)
                forget_idle(self.max_bytes - used, gpt, size)
                self._running.append(RunningBatch(candidates))

    def _next_requests(self) -> list[Request]:
        """The requests that can share the next batch. None while more may arrive in time.

        A large request runs one batch at a time, so that small requests need not wait for all of it.
        """
        served = set().union(*(running.requests for running in self._running))
        waiting = [request for request in self._requests if request.waiting and request not in served]
        if not waiting:
            return []
        gpt = waiting[0].model.gpt
        joined = [request for request in waiting if request.can_share_batch(waiting[0])]
        asked = [request.asked_at for request in joined]
        start_at = min(max(asked) + WAIT_SECONDS, min(asked) + MAX_WAIT_SECONDS)
        set_threads(self.threads_for(gpt))  # max_candidates may test products
        full = sum(request.waiting for request in joined) >= max_candidates(gpt)
        return joined if full or time.monotonic() >= start_at else []

    def _decode(self) -> None:
        """Decodes some sampled candidates, of any requests for the same model."""
        if not self._sampled:
            return
        model = self._sampled[0].request.model
        candidates = [candidate for candidate in self._sampled if candidate.request.model is model]
        with errors_to({candidate.request for candidate in candidates}):
            set_threads(model.decode_threads)
            candidates = candidates[: model.at_a_time]
            with contextlib.suppress(Exception):
                return decode(candidates)
            for candidate in candidates:  # alone there may be enough memory, and others get no error
                with errors_to([candidate.request]):
                    decode([candidate])

    def _sample(self) -> None:
        """Samples a token of every candidate in a batch."""
        for running in self._running:
            set_threads(self.threads_for(running.batch.gpt))
            with errors_to(running.requests):
                self._sampled += running.step()

    def _report(self) -> None:
        """Tells those who listen how far their requests are."""
        for running in self._running:
            for request in running.requests:
                if request.listener is not None and request.listener.due and not request.result.done():
                    with errors_to([request]):
                        preview = self._preview(running, request) if request.listener.previews else None
                        request.listener.report(request.progress(running.tokens_of(request), preview))

    def _preview(self, running: RunningBatch, request: Request) -> Image.Image | None:
        """A picture of an unfinished request; None if previews have used up their share of the time.

        Of the thread's CPU time, because it does not depend on other processes.
        """
        started = time.thread_time()
        if started < self._next_preview:
            return None
        set_threads(request.model.decode_threads)
        preview = running.preview(request)
        self._next_preview = started + (time.thread_time() - started) / PREVIEW_SHARE
        return preview

    def _drop_ended(self) -> None:
        self._requests = [request for request in self._requests if not request.result.done()]
        self._running = [running for running in self._running if running.wanted]
        self._sampled = [one for one in self._sampled if one.image is None and not one.request.result.done()]


def decode(candidates: list[Candidate]) -> None:
    """Decodes candidates of one model, at most at_a_time, and adds them to their requests."""
    tokens = torch.stack([candidate.tokens for candidate in candidates])
    embeddings = torch.cat([candidate.request.ranked_by(candidate.number) for candidate in candidates])
    inpaintings = [candidate.request.inpainting for candidate in candidates]
    decoded = candidates[0].request.model.decode(tokens, embeddings, inpaintings)
    for candidate, image_and_score in zip(candidates, decoded, strict=True):
        candidate.request.finish(candidate, *image_and_score)


def batch_bytes(gpt: GPT, sampling: Sampling, candidates: int) -> int:
    """An upper bound of a batch's memory: keys and values of every layer; logits and the tensors computed from them."""
    config = gpt.config
    in_diagonals = gpt.steps is not None
    itemsize = (gpt.dtype if in_diagonals else gpt.cache_dtype).itemsize
    cache = 2 * config.n_layer * config.block_size * config.n_embd * itemsize
    positions = int(gpt.steps.bincount().amax()) if in_diagonals else 1  # of the widest step
    logits = positions * 12 * config.codebook_size * 4
    return candidates * (cache + logits) * sampling.passes


# By process: a forked child has neither its parent's threads nor anyone to release its parent's lock.
_locks: dict[int, threading.Lock] = {}
_batchers: dict[tuple[int, str, int], Batcher] = {}


def shared_batcher(device: torch.device) -> Batcher:
    """The batcher of this process and device, made on the first call with half of the free memory."""
    process = os.getpid()
    key = process, device.type, device.index or 0
    with _locks.setdefault(process, threading.Lock()):
        if key not in _batchers:
            _batchers[key] = Batcher(available_memory(device) / 2)
            atexit.register(_batchers[key].close)  # a thread that ends inside torch would abort the process
        return _batchers[key]
