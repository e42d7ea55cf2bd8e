"""What the batcher's thread works on: requests for candidates, their batches, and calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from clip_gen.networks.gpt import GPT
from clip_gen.sampling.sampler import Batch, Sampling, Stopped


@dataclass(frozen=True)
class Sampled:
    """The tokens of a request, and its timing."""

    tokens: Tensor  # (candidates, T)
    queue_seconds: float  # before its first batch began
    sampling_seconds: float  # from its first token to its last
    rows_in_batch: float  # mean number of candidates in its batches, including those of other requests

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "queue_seconds": round(self.queue_seconds, 4),
            "sampling_seconds": round(self.sampling_seconds, 4),
            "tokens_per_second": round(self.tokens.numel() / max(self.sampling_seconds, 1e-6), 1),
            "rows_in_batch": round(self.rows_in_batch, 2),
        }


@dataclass(eq=False)
class Call:
    """Work for the batcher's thread: a function without arguments, or one row of a function of rows."""

    work: Callable
    threads: int
    before_sampling: bool = False  # the caller will ask for candidates next
    row: object = None
    max_rows: int = 0  # that `work` takes at a time; 0: it takes no arguments
    result: Future = field(default_factory=Future)

    def joins(self, other: Call) -> bool:
        """Whether both are rows of the same function."""
        return self.max_rows > 0 and (self.work, self.max_rows) == (other.work, other.max_rows)


def run_calls(calls: list[Call]) -> None:
    """Runs one call, or calls that join. If several fail together, each runs alone, so that others get no error."""
    first = calls[0]
    try:
        results = first.work([call.row for call in calls]) if first.max_rows else [first.work()]
    except BaseException as error:  # the caller gets any error
        if len(calls) == 1:
            first.result.set_exception(error)
            return
    else:
        for call, result in zip(calls, results, strict=True):
            call.result.set_result(result)
        return
    for call in calls:  # outside of `except`, whose error would keep the memory of the failed call
        run_calls([call])


@dataclass(eq=False)
class Request:
    gpt: GPT
    embedding: Tensor  # (1, E)
    uniforms: Tensor  # (candidates, T)
    sampling: Sampling
    should_stop: Callable[[], bool] | None
    waits_since: float
    tokens: Tensor  # (candidates, T), filled in by finished batches
    result: Future = field(default_factory=Future)
    interrupted: bool = False  # its caller no longer waits
    started_rows: int = 0
    finished_rows: int = 0
    asked_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    batch_rows: list[int] = field(default_factory=list)  # the number of candidates in each of its batches

    @property
    def waiting_rows(self) -> int:
        return 0 if self.result.done() else len(self.uniforms) - self.started_rows

    def can_share_batch(self, other: Request) -> bool:
        return self.gpt is other.gpt and self.sampling == other.sampling

    def start_rows(self, count: int) -> list[tuple[Request, int]]:
        """The next `count` candidates, as rows of a batch."""
        rows = [(self, self.started_rows + i) for i in range(count)]
        self.started_rows += count
        self.started_at = self.started_at or time.monotonic()
        return rows

    def finish_row(self, candidate: int, tokens: Tensor) -> None:
        self.tokens[candidate] = tokens
        self.finished_rows += 1
        if self.finished_rows < len(self.uniforms) or self.result.done():
            return
        self.result.set_result(
            Sampled(
                self.tokens.to(self.embedding.device),
                self.started_at - self.waits_since,
                time.monotonic() - self.started_at,
                sum(self.batch_rows) / len(self.batch_rows),
            )
        )

    def fail(self, error: BaseException) -> None:
        if not self.result.done():
            self.result.set_exception(error)

    def check_stop(self) -> None:
        """Ends the request with Stopped if its caller wants that, or with the error of should_stop."""
        if self.result.done():
            return
        try:
            if self.interrupted or (self.should_stop is not None and self.should_stop()):
                self.fail(Stopped())
        except BaseException as error:  # the caller gets any error
            self.fail(error)


@dataclass(eq=False)
class RunningBatch:
    batch: Batch
    rows: list[tuple[Request, int]]  # each row's request and candidate number

    @property
    def requests(self) -> set[Request]:
        return {request for request, _ in self.rows}

    @property
    def wanted(self) -> bool:
        return not self.batch.done and any(not request.result.done() for request in self.requests)

    def step(self) -> None:
        """Samples a token of every row; delivers the tokens after the last one."""
        self.batch.step()
        if self.batch.done:
            for (request, candidate), tokens in zip(self.rows, self.batch.tokens.cpu(), strict=True):
                request.finish_row(candidate, tokens)
