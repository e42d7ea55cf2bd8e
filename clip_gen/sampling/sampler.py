"""Logits -> next token -> tokens: temperature, top-k, top-p, guidance, and seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from clip_gen.networks.gpt import GPT
from clip_gen.sampling.cuda_graphs import RecordedSteps, has_kernels, is_ready
from clip_gen.validation import check_sampling

# Matrix products over other numbers of rows may take other code paths and round differently (by 1e-6 on a CPU with
# AVX2), which now and then flips a token. So on a CPU products have one of those NUMBERS of rows that round alike
# there, filled up with the last row: a candidate's bits are then the same whatever stands beside it. Where none that
# round alike reach ROWS, every batch is filled up to ROWS, and with guidance to twice that.
ROWS = 16
NUMBERS = (1, 2, 4, 5, 6, 8, 10, 12, 16, 18, 20, 24, 32, 36, 40, 48, 64, 72)  # FBGEMM takes six at a time
SHARED = 32  # candidates in a batch; guidance takes two rows for each
# A GPU reads all weights for each step, however many rows there are; a batch of up to ROWS is still one of ROWS.
GPU_ROWS = 64

GREEDY = 1e-4  # temperatures below this take the likeliest token: dividing by less overflows


class Stopped(Exception):
    """Somebody no longer wants the picture."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # 0: always the likeliest
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off; 0: always the likeliest
    guidance: float = 1.0  # 1: off

    @property
    def passes(self) -> int:
        """How many rows a candidate takes: with guidance an unconditional one too."""
        return 1 if self.guidance == 1 else 2

    @property
    def greedy(self) -> list[str]:
        """The settings that always take the likeliest token, so that all candidates of a prompt are the same."""
        alone = {"temperature": self.temperature < GREEDY, "top_k": self.top_k == 1, "top_p": self.top_p == 0}
        return [name for name, only_one in alone.items() if only_one]

    def check(self) -> None:
        """Raises ValueError naming the value and what it may be."""
        check_sampling(**vars(self))


def candidate_uniforms(seed: int, candidates: range, length: int) -> Tensor:
    """The randomness of each candidate, (n, length) float32 in [0, 1): a function of (seed, candidate) alone."""
    rows = [np.random.default_rng([seed, i]).random(length, np.float32) for i in candidates]
    return torch.from_numpy(np.stack(rows))


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on logits (B, V): 1 is the conditional, more pushes away from the unconditional.

    arXiv 2207.12598.
    """
    return unconditional + guidance * (conditional - unconditional)


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) logits to probabilities after temperature, then top-k, then top-p. The likeliest token always stays."""
    if sampling.temperature < GREEDY:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        logits = logits.masked_fill(~likeliest(logits, sampling.top_k), -torch.inf)
    probabilities = logits.softmax(dim=1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
        # A token stays while those likelier than it have not yet filled the share.
        dropped = ranked.cumsum(dim=1) - ranked >= sampling.top_p
        dropped[:, 0] = False
        ranked = ranked.masked_fill(dropped, 0.0)
        # Not the sum: of a single row it is another than beside others, where several threads share it out.
        ranked = ranked / ranked.cumsum(dim=1)[:, -1:]
        probabilities = torch.zeros_like(ranked).scatter_(1, order, ranked)
    return probabilities


def likeliest(logits: Tensor, k: int) -> Tensor:
    """Which k of each row's logits (B, V) are the largest, (B, V) bool; of equal ones those of the lowest tokens."""
    least = logits.topk(k, dim=1).values[:, -1:]
    larger, equal = logits > least, logits == least
    return larger | (equal & (equal.cumsum(dim=1) <= k - larger.sum(dim=1, keepdim=True)))


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which each row's running sum of (B, V) passes its uniform (B,) in [0, 1)."""
    if has_kernels(probabilities.device):
        from clip_gen.sampling import triton_kernels  # Triton: only where there is a GPU

        return triton_kernels.draw(probabilities, uniform)
    total = probabilities.cumsum(dim=1)
    whole = total[:, -1:].contiguous()
    # Scaled by the last sum, which rounding leaves a little off one.
    token = torch.searchsorted(total, uniform[:, None] * whole, right=True)
    # Past the end only by rounding: then the token at which the sum is whole. What is no number has none.
    return torch.minimum(token, torch.searchsorted(total, whole))[:, 0].clamp_(max=probabilities.shape[1] - 1)


def most_rows(gpt: GPT) -> int:
    """How many candidates share a batch."""
    if gpt.device.type == "cuda":
        return GPU_ROWS
    return SHARED if min(max(numbers_of_rows(gpt, passes)) for passes in (1, 2)) >= SHARED else ROWS


def rows_of(gpt: GPT, count: int, passes: int = 1) -> int:
    """With how many rows a batch of so many candidates goes through the transformer, in each of its passes (2 with
    guidance); beyond the largest that numbers_of_rows knows, just as many.
    """
    if gpt.device.type == "cuda":
        return ROWS if count <= ROWS else max(count, GPU_ROWS)
    return next((number for number in numbers_of_rows(gpt, passes) if number >= count), count)


def numbers_of_rows(gpt: GPT, passes: int = 1) -> tuple[int, ...]:
    """Those of NUMBERS, the least first, with which a row of every product of this transformer has the same bits when
    it has so many rows for each pass.

    Found out once for each transformer. ROWS alone in bfloat16, whose rounding hides most of what would differ.
    """
    known, kind = _alike.setdefault(gpt, {}), (gpt.dtype, type(gpt.head))
    if kind not in known:
        alike = {ROWS}
        if gpt.dtype == torch.float32:
            with contextlib.suppress(RuntimeError):  # out of memory, say: whose batch it is will hear of it
                alike = _found_alike(gpt)
        known[kind] = alike
    found = tuple(number for number in NUMBERS if {number, number * passes} <= known[kind])
    return found if found and found[-1] >= ROWS else (ROWS,)


_alike: WeakKeyDictionary[GPT, dict[tuple[torch.dtype, type], set[int]]] = WeakKeyDictionary()


@torch.inference_mode()
def _found_alike(gpt: GPT) -> set[int]:
    """Those of NUMBERS with which rows have the bits that they have in products of ROWS."""
    block, alike = gpt.blocks[0], set(NUMBERS)
    around = gpt.around if gpt.neighbour_table is None else None
    linears = block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj, gpt.condition, around, gpt.head
    for linear in filter(None, linears):
        x = torch.randn(5 * ROWS, linear.in_features, generator=torch.Generator().manual_seed(0))
        usual = torch.cat([linear(rows) for rows in x.split(ROWS)])
        alike &= {
            number
            for number in NUMBERS
            if torch.equal(linear(x[:number]), usual[:number]) and torch.equal(linear(x[-number:]), usual[-number:])
        }
    return alike


class GrowingSteps:
    """The steps of one batch: called with nothing at first, then with the last token (B,), gives logits (B, V).

    Matrix products have `rows` rows, the last one repeated; all else is done for the B alone.
    """

    def __init__(self, gpt: GPT, prefix: Tensor, rows: int):
        self.gpt, self.prefix, self.rows = gpt, prefix, rows
        self.cache = gpt.new_cache(len(prefix))

    def __call__(self, last: Tensor | None) -> Tensor:
        if last is None:
            logits = self.gpt.start(padded(self.prefix, self.rows), self.cache)
        else:
            logits = self.gpt.step(padded(last, self.rows), self.cache)
        return logits[: len(self.prefix)]

    def copy_rows(self, other: GrowingSteps, rows: Tensor) -> None:
        """Continues these rows (B,) of another batch."""
        self.cache.copy_rows(other.cache, rows)
        if self.gpt.around is not None:
            self.cache.prefix = padded(self.prefix, self.rows)
            self.cache.tokens = padded(other.cache.tokens[rows], self.rows)


class Batch:
    """Candidates drawn together, a token of each at a time: `step` until `done`, then `tokens` (B, T) are there.

    embedding: (B, E), one candidate a row. uniforms: (B, T) in [0, 1), what decides each draw. ValueError for guidance
    where the model has no null condition. recorded: by CUDA graphs and what they ask for; if not given, on a GPU.
    """

    @torch.inference_mode()
    def __init__(self, gpt: GPT, embedding: Tensor, uniforms: Tensor, sampling: Sampling, recorded: bool | None = None):
        check_guidance(gpt, sampling)
        device = embedding.device
        self.gpt, self.sampling, self.uniforms, self.drawn = gpt, sampling, uniforms.to(device), 0
        self._tokens = torch.empty(uniforms.shape, dtype=torch.long, device=device)
        self.recorded = device.type == "cuda" if recorded is None else recorded
        self.passes = sampling.passes
        rows = rows_of(gpt, len(uniforms), self.passes)
        embedding = padded(embedding, rows)
        prefixes = [gpt.prefix(embedding)]
        if self.passes == 2:
            prefixes.append(gpt.prefix(embedding, torch.ones(rows, dtype=torch.bool, device=device)))
        self.width = rows if self.recorded else len(uniforms)
        self.steps = self._steps(torch.cat([prefix[: self.width] for prefix in prefixes]), rows)

    def _steps(self, prefix: Tensor, rows: int) -> GrowingSteps | RecordedSteps:
        if self.recorded:
            return RecordedSteps(self.gpt, prefix)
        return GrowingSteps(self.gpt, prefix, rows * self.passes)

    @property
    def done(self) -> bool:
        return self.drawn == self._tokens.shape[1]

    @property
    def tokens(self) -> Tensor:
        assert self.done
        return self._tokens

    @torch.inference_mode()
    def step(self) -> None:
        """Draws the next token of every row."""
        t = self.drawn
        last = padded(self._tokens[:, t - 1], self.width) if t else None
        if last is not None and self.passes > 1:
            last = last.repeat(self.passes)
        logits = [rows[: len(self._tokens)].float() for rows in self.steps(last).chunk(self.passes)]
        chosen = logits[0] if self.passes == 1 else guided(*logits, self.sampling.guidance)
        self._tokens[:, t] = draw(filtered_probabilities(chosen, self.sampling), self.uniforms[:, t])
        self.drawn += 1

    @torch.inference_mode()
    def keep(self, wanted: list[int]) -> bool:
        """Goes on with these rows alone, which stay what they would have been. False, and nothing happens, before the
        first token, and where that saves little for what it takes: the cache is copied.
        """
        rows = rows_of(self.gpt, len(wanted), self.passes)
        width = rows if self.recorded else len(wanted)
        ready = is_ready(self.gpt, rows * self.passes) if self.recorded else True
        if 4 * width > 3 * self.width or not self.drawn or not ready:
            return False
        kept = torch.tensor(wanted, device=self._tokens.device)
        places = torch.cat([padded(kept, width) + number * self.width for number in range(self.passes)])
        steps = self._steps(self.steps.prefix[places], rows)
        steps.copy_rows(self.steps, places)
        self.steps, self.width = steps, width
        self._tokens, self.uniforms = self._tokens[kept], self.uniforms[kept]
        return True


def check_guidance(gpt: GPT, sampling: Sampling) -> None:
    """Raises ValueError for guidance by a transformer without a null condition."""
    if sampling.passes > 1 and gpt.null_condition is None:
        raise ValueError(
            f"guidance is {sampling.guidance}, but this model was trained without a null condition to push away from; "
            "leave guidance at 1, or fine-tune the model, which adds one"
        )


def sample_tokens(
    gpt: GPT,
    embedding: Tensor,
    uniforms: Tensor,
    sampling: Sampling,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """A whole Batch: tokens (B, T) int64. should_stop is asked before every token; Stopped when it says so."""
    batch = Batch(gpt, embedding, uniforms, sampling)
    while not batch.done:
        if should_stop is not None and should_stop():
            raise Stopped
        batch.step()
    return batch.tokens


def padded(rows: Tensor, least: int) -> Tensor:
    """At least this many rows, the last one repeated."""
    missing = least - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
