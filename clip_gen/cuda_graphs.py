"""The transformer's steps on a GPU: recorded once as CUDA graphs, then replayed for every token of every batch.

A step at a time a GPU waits for Python: a step of 24 layers is some 400 small kernels, each told to start from the
outside. A CUDA graph starts all of them at once, but always does the same work on the same memory. So the cache has its
full size from the start, and where the next token goes is a number on the device. A step must not look at more of the
cache than it has to, or the longest would set the pace: there is a graph for each quarter of the picture.

On a CPU the same steps are simply worked through, which is how the tests see them.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from clip_gen.config import GPTConfig
from clip_gen.gpt import GPT, KVCache

SPANS = 4  # graphs for a picture
WARM_UPS = 2  # before recording, so that libraries have set themselves up


class StaticCache(KVCache):
    """A cache whose length is a number on its device, and which shows its first `span` places whatever the length."""

    def __init__(self, config: GPTConfig, rows: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(config, rows, device=device, dtype=dtype)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(config.block_size, device=device)
        self.look_at(config.block_size)

    def look_at(self, span: int) -> None:
        self.span = span
        self.mask = (self.places[:span] <= self.position).view(1, 1, 1, span)

    @property
    def place(self) -> Tensor:
        return self.position

    def advance(self, tokens: int) -> None:
        self.position += tokens

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, keys)
        self.values[layer].index_copy_(2, self.position, values)
        return self.keys[layer, :, :, : self.span], self.values[layer, :, :, : self.span]


class Recording:
    """The memory that one batch of `rows` works in, and the graphs of its steps. Holds no reference to the GPT."""

    def __init__(self, gpt: GPT, rows: int):
        config, device = gpt.config, gpt.head.weight.device
        self.cache = StaticCache(config, rows, device=device, dtype=gpt.dtype)
        self.prefix = torch.zeros(rows, config.n_embd, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.logits = torch.zeros(rows, config.codebook_size, device=device)
        self.spans = sorted({-(-config.block_size * i // SPANS) for i in range(1, SPANS + 1)})
        self.graphs = {span: self._record(gpt, span) for span in self.spans} if device.type == "cuda" else {}

    def work(self, gpt: GPT, span: int) -> None:
        """One step: what `token`, or at first `prefix`, makes of `logits`."""
        self.cache.look_at(span)
        x = torch.where(self.cache.position == 0, self.prefix, gpt.token_embedding(self.token))
        self.logits.copy_(gpt.next(x, self.cache))

    def _record(self, gpt: GPT, span: int) -> torch.cuda.CUDAGraph:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self.work(gpt, span)
            self.cache.position.zero_()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on asking the GPU for things meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.work(gpt, span)
        return graph


_idle: weakref.WeakKeyDictionary[GPT, dict[int, list[Recording]]] = weakref.WeakKeyDictionary()


class RecordedSteps:
    """The steps of one batch: called with nothing at first, then with the last token (B,), gives logits (B, V).

    The logits are overwritten by the next step. Recordings are kept for the batches that come after this one.
    """

    @torch.inference_mode()
    def __init__(self, gpt: GPT, prefix: Tensor):
        self.gpt, self.steps = gpt, 0
        idle = _idle.setdefault(gpt, {}).setdefault(len(prefix), [])
        self.recording = idle.pop() if idle else Recording(gpt, len(prefix))
        weakref.finalize(self, idle.append, self.recording)
        self.recording.prefix.copy_(prefix)
        self.recording.cache.position.zero_()

    def __call__(self, last: Tensor | None) -> Tensor:
        recording = self.recording
        if last is not None:
            recording.token.copy_(last)
        span = next(span for span in recording.spans if span > self.steps)
        if recording.graphs:
            recording.graphs[span].replay()
        else:
            recording.work(self.gpt, span)
        self.steps += 1
        return recording.logits
