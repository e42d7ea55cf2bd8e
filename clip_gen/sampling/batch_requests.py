"""What a batcher works on: requests, their candidates, and the batches of these."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from clip_gen.networks.gpt import GPT
from clip_gen.sampling.condition import Condition
from clip_gen.sampling.inpainting import Inpainting
from clip_gen.sampling.progress import Listener, Progress
from clip_gen.sampling.sampler import Batch, Sampling, Stopped, TokenLikelihoods

DRAWN_FROM = 0.8  # share of what a candidate was drawn from when it is ranked


class Model(Protocol):
    """What a batcher needs of a model. It calls the methods in its own thread."""

    gpt: GPT
    at_a_time: int  # the number of candidates that `decode` takes
    likelihood_weight: float  # of the mean log-likelihood of a candidate's sampled tokens, in its score
    decode_threads: int  # of the CPU, to embed conditions and to decode

    def embed(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The embeddings (1, E) of what to show and of what not to show, if that is given."""

    def conditions(self, request: Request) -> Tensor:
        """What each candidate of an embedded request is drawn from, (K, E)."""

    def kept_tokens(self, inpainting: Inpainting) -> Tensor:
        """The tokens (T,) of a picture, and -1 for those to sample."""

    def decode(
        self, tokens: Tensor, embeddings: Tensor, inpaintings: Sequence[Inpainting | None]
    ) -> list[tuple[Image.Image, float]]:
        """Images and scores of candidates: tokens (n, T), and what their embeddings are multiplied with, (n, E).

        inpaintings: the pictures that candidates are pasted into, None for whole pictures.
        """

    def preview(
        self, tokens: Tensor, embeddings: Tensor, inpainting: Inpainting | None
    ) -> list[tuple[Image.Image, float]]:
        """As `decode`, of unfinished candidates: tokens (n, T), -1 where there is none yet."""


@dataclass(eq=False)
class Candidate:
    """One image of a request, before and after it is drawn."""

    request: Request | None  # None once the request has ended
    number: int
    tokens: Tensor | None = None  # (T,)
    likelihood: float = 0.0  # what the log-likelihoods of its tokens add to the score
    image: Image.Image | None = None
    score: float = 0.0


@dataclass(eq=False)
class Request:
    """Candidates of one condition; candidate i is drawn with the random numbers uniforms[i], (T,).

    num_outputs: how many of the best are kept, best first; None: all, in their order. should_stop: called before every
    token; the request ends with Stopped once it returns True. inpainting: the picture to redraw a part of, if any.
    listener: hears how far the request is. chances: (K,) in [0, 1), which remembered pictures or completions they get.
    """

    model: Model
    condition: Condition
    uniforms: Tensor
    sampling: Sampling
    num_outputs: int | None = None
    should_stop: Callable[[], bool] | None = None
    inpainting: Inpainting | None = None
    listener: Listener | None = None
    chances: Tensor | None = None
    result: Future[list[Candidate]] = field(default_factory=Future)
    asked_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0  # when its first batch started
    embedding: Tensor | None = None  # (1, E)
    conditions: Tensor | None = None  # (K, E)
    negative: Tensor | None = None  # (1, E), if the condition says what not to show
    kept: Tensor | None = None  # (T,) with an inpainting: the picture's tokens, and -1 for those to sample
    started: int = 0  # candidates that are in a batch or were
    decoded: int = 0
    best: list[Candidate] = field(default_factory=list)  # of the decoded ones
    batches: list[tuple[int, float]] = field(default_factory=list)  # rows and seconds of the finished ones

    @property
    def waiting(self) -> int:
        """Candidates that are in no batch yet."""
        return 0 if self.result.done() else len(self.uniforms) - self.started

    @property
    def metrics(self) -> dict[str, float]:
        """Of a finished request. queue_seconds: until its first batch started. rows_in_batch: mean number of candidates
        in its batches, including those of other requests.
        """
        rows, seconds = zip(*self.batches, strict=True)
        return {
            "queue_seconds": round(self.started_at - self.asked_at, 4),
            "sampling_seconds": round(sum(seconds), 4),
            "tokens_per_second": round(self.uniforms.numel() / max(sum(seconds), 1e-6), 1),
            "rows_in_batch": round(sum(rows) / len(rows), 2),
        }

    def ranked_by(self, number: int) -> Tensor:
        """(1, E), whose product with the embedding of a candidate's image is its score.

        Between what is asked for and what the candidate was drawn from, which differ if the model has a memory: an
        image that is unlike the latter is badly drawn.
        """
        wanted = self.embedding.lerp(self.conditions[number], DRAWN_FROM)
        return wanted if self.negative is None else wanted - self.negative

    def can_share_batch(self, other: Request) -> bool:
        alike = self.sampling == other.sampling and (self.negative is None) == (other.negative is None)
        return self.model.gpt is other.model.gpt and alike

    def start(self, count: int) -> list[Candidate]:
        """The next `count` waiting candidates, or fewer if no more are left."""
        numbers = range(self.started, min(self.started + count, len(self.uniforms)))
        self.started += len(numbers)
        return [Candidate(self, number) for number in numbers]

    def finish(self, candidate: Candidate, image: Image.Image, score: float) -> None:
        """Adds a decoded candidate. Ends the request if it is the last one."""
        candidate.image, candidate.score = image, score + candidate.likelihood
        self.decoded += 1
        self.best.append(candidate)
        if self.num_outputs is not None:
            self.best = sorted(self.best, key=lambda candidate: candidate.score, reverse=True)[: self.num_outputs]
        if self.decoded == len(self.uniforms):
            for kept in self.best:
                kept.request = None  # a cycle would keep the model and the images until a garbage collection
            with contextlib.suppress(InvalidStateError):  # the request has ended before
                self.result.set_result(self.best)

    def progress(self, tokens: int, preview: Image.Image | None = None) -> Progress:
        """The progress of a request whose candidates have so many tokens together."""
        return Progress(tokens, self.uniforms.numel(), time.monotonic() - self.started_at, preview)

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self.result.set_exception(error)

    def check_stop(self) -> None:
        with errors_to([self]):
            if self.should_stop is not None and self.should_stop():
                raise Stopped


@contextmanager
def errors_to(requests: Iterable[Request]) -> Iterator[None]:
    """Ends these requests with any error of the `with` block."""
    try:
        yield
    except BaseException as error:
        for request in requests:
            request.fail(error)


class RunningBatch:
    """Candidates of requests that can share a batch, being sampled."""

    def __init__(self, candidates: list[Candidate]):
        self.candidates, self.started_at = candidates, time.monotonic()
        self.requests = {candidate.request for candidate in candidates}
        self._rows: dict[Request, list[int]] = {}  # of its candidates, the one that the last preview showed first
        for request in self.requests:
            request.started_at = request.started_at or self.started_at
        embedding = torch.stack([candidate.request.conditions[candidate.number] for candidate in candidates])
        uniforms = torch.stack([candidate.request.uniforms[candidate.number] for candidate in candidates])
        first = candidates[0].request
        negative = None
        if first.negative is not None:
            negative = torch.cat([candidate.request.negative for candidate in candidates])
        kept = None
        if any(request.kept is not None for request in self.requests):
            all_sampled = torch.full((uniforms.shape[1],), -1, device=embedding.device)
            rows = [candidate.request.kept for candidate in candidates]
            kept = torch.stack([all_sampled if row is None else row for row in rows])
        self.likelihood_weight = first.model.likelihood_weight
        ranked = self.likelihood_weight > 0
        self.batch = Batch(first.model.gpt, embedding, uniforms, first.sampling, negative, kept, likelihoods=ranked)

    @property
    def wanted(self) -> bool:
        return not self.batch.done and not all(request.result.done() for request in self.requests)

    def step(self) -> list[Candidate]:
        """Samples a token of every candidate; returns all candidates after the last token, before that none."""
        self.batch.step()
        if not self.batch.done:
            return []
        for request in self.requests:
            request.batches.append((len(self.candidates), time.monotonic() - self.started_at))
        for candidate, tokens in zip(self.candidates, self.batch.tokens, strict=True):
            candidate.tokens = tokens
        if self.batch.likelihoods is not None:
            self._add_likelihoods(self.batch.likelihoods)
        return self.candidates

    def _add_likelihoods(self, found: TokenLikelihoods) -> None:
        counted = (found.of_kept + self.likelihood_weight * found.of_sampled).tolist()
        if not all(map(math.isfinite, counted)):
            raise ValueError(f"the likelihoods are {counted[:4]}: the weights of this model's transformer are damaged")
        for candidate, likelihood in zip(self.candidates, counted, strict=True):
            candidate.likelihood = likelihood

    def tokens_of(self, request: Request) -> int:
        """How many tokens the candidates of a request have together, those of its earlier batches included."""
        rows = len(self._rows_of(request))
        return (request.started - rows) * self.batch.tokens.shape[1] + rows * self.batch.length

    def preview(self, request: Request) -> Image.Image:
        """The best finished candidate of a request; before one is finished, the better of two unfinished ones.

        These are the last preview's and the next one in turn. Without ranking it is the first candidate.
        """
        if request.best:
            return request.best[0].image
        rows = self._rows_of(request)
        compared = rows[: 1 if request.num_outputs is None else 2]
        others = self.batch.tokens.new_tensor(-1) if self.batch.kept is None else self.batch.kept[compared]
        tokens = torch.where(self.batch.drawn, self.batch.tokens[compared], others)
        wanted = torch.cat([request.ranked_by(self.candidates[row].number) for row in compared])
        pictures = request.model.preview(tokens, wanted, request.inpainting)
        better, (image, _) = max(zip(compared, pictures, strict=True), key=lambda pair: pair[1][1])
        self._rows[request] = [better, *rows[2:], *(row for row in compared if row != better)]
        return image

    def _rows_of(self, request: Request) -> list[int]:
        rows = (row for row, candidate in enumerate(self.candidates) if candidate.request is request)
        return self._rows.get(request) or self._rows.setdefault(request, list(rows))
