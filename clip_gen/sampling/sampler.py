"""Samples tokens: logits to the next token, with temperature, top-k, top-p, guidance and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clip_gen.networks.gpt import GPT
from clip_gen.sampling.batch_sizes import pad_rows, padded_batch_size
from clip_gen.sampling.cuda_graphs import RecordedSteps, has_kernels
from clip_gen.sampling.diagonal import DiagonalSteps
from clip_gen.sampling.windows import Window, WindowSteps, first_guesses, window_length
from clip_gen.validation import check_sampling

MIN_TEMPERATURE = 1e-4  # below it sampling is greedy, because dividing by less overflows


class Stopped(Exception):
    """Sampling was stopped by the caller."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of the next token."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off; 0: greedy
    guidance: float = 1.0  # 1: off

    @property
    def passes(self) -> int:
        """Rows per candidate: guidance adds an unconditional one."""
        return 1 if self.guidance == 1 else 2

    @property
    def greedy(self) -> list[str]:
        """The settings that make sampling greedy, so that all candidates of a prompt are the same."""
        greedy = {"temperature": self.temperature < MIN_TEMPERATURE, "top_k": self.top_k == 1, "top_p": self.top_p == 0}
        return [name for name, value in greedy.items() if value]

    def check(self) -> None:
        """Raises ValueError that names the wrong value and its range."""
        check_sampling(**vars(self))


def candidate_uniforms(seed: int, candidates: range, length: int) -> Tensor:
    """The random numbers of candidates, (n, length) float32 in [0, 1); each row depends on (seed, candidate) alone."""
    rows = [np.random.default_rng([seed, i]).random(length, np.float32) for i in candidates]
    return torch.from_numpy(np.stack(rows))


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on logits (B, V), arXiv 2207.12598. 1 gives the conditional logits.

    unconditional: of the null condition or of what should not be shown.
    """
    return unconditional + guidance * (conditional - unconditional)


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) of logits (B, V): temperature, then top-k, then top-p. The likeliest token always stays."""
    if sampling.temperature < MIN_TEMPERATURE:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        logits = logits.masked_fill(~top_k_mask(logits, sampling.top_k), -torch.inf)
    probabilities = logits.softmax(dim=1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
        # A token stays if the likelier ones sum to less than top_p.
        dropped = ranked.cumsum(dim=1) - ranked >= sampling.top_p
        dropped[:, 0] = False
        ranked = ranked.masked_fill(dropped, 0.0)
        # Not ranked.sum(): on several threads its rounding depends on the number of rows.
        ranked = ranked / ranked.cumsum(dim=1)[:, -1:]
        probabilities = torch.zeros_like(ranked).scatter_(1, order, ranked)
    return probabilities


def top_k_mask(logits: Tensor, k: int) -> Tensor:
    """Whether each logit (B, V) is among the k largest of its row, (B, V) bool; ties go to the lowest tokens."""
    least = logits.topk(k, dim=1).values[:, -1:]
    larger, equal = logits > least, logits == least
    return larger | (equal & (equal.cumsum(dim=1) <= k - larger.sum(dim=1, keepdim=True)))


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the running sum of probabilities (B, V) passes uniform (B,) in [0, 1)."""
    if has_kernels(probabilities.device):
        from clip_gen.sampling import triton_kernels  # needs Triton

        return triton_kernels.draw(probabilities, uniform)
    sums = probabilities.cumsum(dim=1)
    total = sums[:, -1:].contiguous()  # almost 1
    token = torch.searchsorted(sums, uniform[:, None] * total, right=True)
    # Rounding may pass the end: then take the last token with a probability. The clamp is for NaN.
    return torch.minimum(token, torch.searchsorted(sums, total))[:, 0].clamp_(max=probabilities.shape[1] - 1)


class GrowingSteps:
    """The steps of one batch: called with None first, then with the last token (B,); returns logits (B, V).

    Matrix products are padded to `rows` rows, the rest is computed for B.
    """

    def __init__(self, gpt: GPT, prefix: Tensor, rows: int):
        self.gpt, self.rows = gpt, rows
        self.cache = gpt.new_cache(pad_rows(prefix, rows), len(prefix))

    def __call__(self, last: Tensor | None) -> Tensor:
        last = None if last is None else pad_rows(last, self.rows)
        return self.gpt.step(last, self.cache)[: self.cache.rows]


class Batch:
    """Candidates sampled together. Call `step`, which samples a token of each, until `done`; then read `tokens` (B, T).

    embedding: (B, E), one row per candidate. uniforms: (B, T) in [0, 1), the random numbers. negative: (B, E), replaces
    the null condition in guidance. kept: (B, T), tokens that are taken as they are, and -1 where one is sampled.
    recorded: use CUDA graphs; None: if on a GPU. likelihoods: measure them; with `kept` they always are. ValueError for
    guidance without `negative` with a model that has no null condition.
    """

    @torch.inference_mode()
    def __init__(
        self,
        gpt: GPT,
        embedding: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        negative: Tensor | None = None,
        kept: Tensor | None = None,
        recorded: bool | None = None,
        likelihoods: bool = False,
    ):
        if negative is None:
            check_guidance(gpt, sampling)
        device = embedding.device
        self.kept = None if kept is None else kept.to(device)
        self.gpt, self.sampling, self.uniforms, self.length = gpt, sampling, uniforms.to(device), 0
        self.tokens = torch.empty(uniforms.shape, dtype=torch.long, device=device)
        needs_likelihoods = likelihoods or kept is not None
        self.likelihoods = TokenLikelihoods(self.tokens, self.kept, gpt.steps) if needs_likelihoods else None
        in_diagonals = gpt.steps is not None
        recorded = device.type == "cuda" and not in_diagonals if recorded is None else recorded
        assert not (recorded and in_diagonals), "a recorded step has one position"
        self.passes = sampling.passes
        rows = padded_batch_size(gpt, len(uniforms), self.passes)
        embedding = pad_rows(embedding, rows)
        prefixes = [gpt.prefix(embedding)]
        if self.passes == 2 and negative is None:
            prefixes.append(gpt.prefix(embedding, torch.ones(rows, dtype=torch.bool, device=device)))
        elif self.passes == 2:
            prefixes.append(gpt.prefix(pad_rows(negative, rows)))
        self.width = rows if recorded else len(uniforms)
        prefix = torch.cat([prefix[: self.width] for prefix in prefixes])
        window = 1 if recorded or in_diagonals else window_length(gpt, *uniforms.shape, self.passes)
        self.window: Window | None = None
        if recorded:
            self.steps = RecordedSteps(gpt, prefix)
        elif in_diagonals:
            self.steps = DiagonalSteps(gpt, prefix, self.passes)
        elif window == 1:
            self.steps = GrowingSteps(gpt, prefix, rows * self.passes)
        else:
            self.width = window  # rows of the logits
            self.window = Window(self.tokens, window, self.kept, first_guesses(gpt, prefix[:1]))
            self.steps = WindowSteps(gpt, pad_rows(prefix, rows * self.passes), self.passes, window)

    @property
    def done(self) -> bool:
        return self.length == self.tokens.shape[1]

    @torch.inference_mode()
    def step(self) -> None:
        """Samples the next token of every row; of a single candidate, and with a row delay, sometimes several."""
        if self.window is not None:
            positions = self.window.move()
            self.window.accept(positions, self._draw(self.steps(self.tokens, positions.start), positions))
            self.length = self.window.final
            return
        if self.gpt.steps is not None:
            positions = self.steps.positions
            self.tokens[:, positions] = self._draw(self.steps(self.tokens), positions)
            self.length = self.steps.length
            return
        t = self.length
        last = pad_rows(self.tokens[:, t - 1], self.width) if t else None
        if last is not None and self.passes > 1:
            last = last.repeat(self.passes)
        self.tokens[:, t : t + 1] = self._draw(self.steps(last), slice(t, t + 1))
        self.length += 1

    def run(self) -> Batch:
        """Samples all tokens."""
        while not self.done:
            self.step()
        return self

    @property
    def drawn(self) -> Tensor:
        """Which positions have their tokens, (T,) bool."""
        drawn = torch.zeros(self.tokens.shape[1], dtype=torch.bool, device=self.tokens.device)
        drawn[slice(self.length) if self.gpt.steps is None else self.steps.order[: self.length]] = True
        return drawn

    def _draw(self, rows: Tensor, positions: slice | Tensor) -> Tensor:
        """The tokens (B, W) at these positions, from the logits (B · W, V) of every pass, which may be padded."""
        uniforms = self.uniforms[:, positions]
        logits = [rows[: uniforms.numel()].float() for rows in rows.chunk(self.passes)]
        chosen = logits[0] if self.passes == 1 else guided(*logits, self.sampling.guidance)
        tokens = draw(filtered_probabilities(chosen, self.sampling), uniforms.flatten()).view(uniforms.shape)
        if self.kept is not None:
            kept = self.kept[:, positions]
            tokens = torch.where(kept < 0, tokens, kept)
        if self.likelihoods is not None:
            self.likelihoods.add(tokens, logits[0], positions)
        return tokens


class TokenLikelihoods:
    """How likely the tokens (B, T) of a batch are to the model, without guidance.

    kept: (B, T), tokens that are taken as they are, -1 where one is sampled; None: all are sampled. steps: (T,), in
    which they are drawn; None: one after the other.
    """

    def __init__(self, tokens: Tensor, kept: Tensor | None, steps: Tensor | None):
        self.logs = torch.zeros(tokens.shape, device=tokens.device)
        are_kept = torch.zeros_like(tokens, dtype=torch.bool) if kept is None else kept >= 0
        self.sampled = ~are_kept
        # Kept tokens that follow a sampled one.
        steps = torch.arange(tokens.shape[1], device=tokens.device) if steps is None else steps
        self.follow = are_kept & (steps > torch.where(are_kept, steps.amax(), steps).amin(dim=1, keepdim=True))

    def add(self, tokens: Tensor, logits: Tensor, positions: slice | Tensor) -> None:
        """tokens: (B, W) at these positions. logits: (B · W, V)."""
        logs = logits.log_softmax(dim=1).gather(1, tokens.reshape(-1, 1))
        self.logs[:, positions] = logs.view(tokens.shape)

    @property
    def of_kept(self) -> Tensor:
        """The mean log-likelihood, in nats, of the kept tokens that follow a sampled one, (B,); 0 if there are none."""
        return self._mean(self.follow)

    @property
    def of_sampled(self) -> Tensor:
        """The mean log-likelihood, in nats, of the sampled tokens, (B,); 0 if there are none."""
        return self._mean(self.sampled)

    def _mean(self, chosen: Tensor) -> Tensor:
        # Not sum(dim=1): its rounding may depend on the number of rows.
        sums = torch.where(chosen, self.logs, 0.0).cumsum(dim=1)[:, -1]
        return sums / chosen.sum(dim=1).clamp(min=1)


def check_guidance(gpt: GPT, sampling: Sampling) -> None:
    """Raises ValueError for guidance with a transformer that has no null condition."""
    if sampling.passes > 1 and gpt.null_condition is None:
        raise ValueError(
            f"guidance is {sampling.guidance}, but this model was trained without a null condition to push away from; "
            "leave guidance at 1, give a negative_prompt, or fine-tune the model, which adds one"
        )


def sample_tokens(gpt: GPT, embedding: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """The tokens (B, T) int64 of a Batch."""
    return Batch(gpt, embedding, uniforms, sampling).run().tokens
