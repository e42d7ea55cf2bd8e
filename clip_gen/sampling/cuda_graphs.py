"""The transformer's steps on a GPU: recorded once as a CUDA graph, then replayed for every token of every batch.

A step at a time a GPU waits for Python: a step of 24 layers is some 200 small kernels, each told to start from the
outside. A CUDA graph starts all of them at once, but always does the same work on the same memory. So the cache has its
full size from the start, and where the next token goes is a number on the device, which the kernels read.

On a CPU the same steps are simply worked through in plain torch, which is how the tests see them.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import weakref

import torch
from torch import Tensor

from clip_gen.config import GPTConfig
from clip_gen.hardware import tensor_float32
from clip_gen.networks.gpt import GPT
from clip_gen.networks.kv_cache import KVCache

WARM_UPS = 2  # before recording, so that libraries have set themselves up and kernels are built

log = logging.getLogger(__name__)


class StaticCache(KVCache):
    """A cache whose length is a number on its device, and which shows all its places whatever the length."""

    def __init__(self, config: GPTConfig, rows: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(config, rows, device=device, dtype=dtype)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(config.block_size, device=device)

    @property
    def place(self) -> Tensor:
        return self.position

    @property
    def written(self) -> int:
        return len(self.places)

    def advance(self) -> None:
        self.position += 1

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, key[:, :, None])
        self.values[layer].index_copy_(2, self.position, value[:, :, None])
        return self.keys[layer], self.values[layer]

    def take(self, other: StaticCache, rows: Tensor) -> None:
        super().take(other, rows)
        self.position.copy_(other.position)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether this is a GPU and Triton works: not every platform has it, and it wants a C compiler and Python headers.

    Warns of a GPU without.
    """
    if device.type != "cuda":
        return False
    try:
        from clip_gen.sampling.triton_kernels import check_toolchain  # Triton: only where there is a GPU

        check_toolchain()
    except (ImportError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        log.warning("drawing is slower than it could be, since Triton does not work here: %s", error)
        return False
    return True


def plain_step(gpt: GPT, x: Tensor, cache: StaticCache) -> Tensor:
    """Logits (B, V) of the token after x (B, n_embd), the longest way: it looks at the whole cache."""
    cache.mask = (cache.places <= cache.position).view(1, 1, 1, -1)
    return gpt.next(x, cache)


def fused_step(gpt: GPT, x: Tensor, cache: StaticCache) -> Tensor:
    """What plain_step gives but for rounding, in half as many kernels: 8 a layer."""
    from clip_gen.sampling.triton_kernels import add_norm, attend  # Triton: only where there is a GPU

    stream, branch = x + gpt.position_embedding.weight[cache.position], None
    for layer, block in enumerate(gpt.blocks):
        qkv = block.attn.qkv(add_norm(stream, branch, block.ln_1, gpt.dtype))
        found = attend(qkv, gpt.rotation, cache.keys[layer], cache.values[layer], cache.position)
        branch = block.attn.proj(found)
        branch = block.mlp(add_norm(stream, branch, block.ln_2, gpt.dtype))
    cache.advance()
    return gpt.head(add_norm(stream, branch, gpt.ln_f, stream.dtype))


def addresses(gpt: GPT) -> list[int]:
    """Where its weights lie. A graph reads them there, and must not once the transformer was moved away and back."""
    return [tensor.data_ptr() for tensor in (*gpt.parameters(), *gpt.buffers())]


class Recording:
    """The memory that one batch of `rows` works in, and the graph of its step. Holds no reference to the GPT."""

    def __init__(self, gpt: GPT, rows: int):
        config, device = gpt.config, gpt.device
        self.step = fused_step if has_kernels(device) else plain_step
        self.weights = addresses(gpt)
        self.cache = StaticCache(config, rows, device=device, dtype=gpt.dtype)
        self.prefix = torch.zeros(rows, config.n_embd, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, config.block_size + 1, dtype=torch.long, device=device)  # for GPT.surrounded
        self.logits: Tensor | None = None  # (rows, V), of the last step
        self.graph = self._record(gpt) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        return self.cache.keys.nbytes + self.cache.values.nbytes

    def work(self, gpt: GPT) -> None:
        """One step: what `token`, or at first `prefix`, makes of `logits`."""
        cache, config = self.cache, gpt.config
        first = cache.position == 0
        if gpt.around is None:
            x = torch.where(first, self.prefix, gpt.token_embedding(self.token))
        else:
            # At first there is no token yet: what is written goes to where the outside is looked up.
            place = torch.where(first, config.block_size, cache.position - 1)
            self.tokens.index_copy_(1, place, torch.where(first, config.codebook_size, self.token)[:, None])
            x = gpt.surrounded_at(cache.position, self.prefix, self.tokens)
        self.logits = self.step(gpt, x, cache)

    def _record(self, gpt: GPT) -> torch.cuda.CUDAGraph:
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        # The head is in float32: a twentieth of a step's time, and in TF32 next to none of it.
        with tensor_float32(self.token.device, gpt.dtype != torch.float32):
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self.work(gpt)
                self.cache.position.zero_()
            torch.cuda.current_stream().wait_stream(aside)
            # Other threads go on asking the GPU for things meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.work(gpt)
        return graph


_idle: weakref.WeakKeyDictionary[GPT, dict[int, list[Recording]]] = weakref.WeakKeyDictionary()


def is_ready(gpt: GPT, rows: int) -> bool:
    """Whether there is an idle recording for so many rows; to make one takes longer than most batches."""
    return bool(_idle.get(gpt, {}).get(rows))


def forget(gpt: GPT) -> None:
    """Lets go of the recordings of a transformer that is not to draw again soon."""
    _idle.pop(gpt, None)


def forget_idle(most_bytes: float, gpt: GPT, rows: int) -> None:
    """Drops recordings on this transformer's device that wait for a batch, until they hold no more than this beside the
    one that the next batch, of so many rows of this transformer, will take.
    """
    next_one = _idle.get(gpt, {}).get(rows, [])[-1:]
    others = [
        (recordings, recording)
        for other, by_rows in list(_idle.items())
        if other.device == gpt.device
        for recordings in by_rows.values()
        for recording in recordings
        if recording not in next_one
    ]
    held = sum(recording.nbytes for _, recording in others)
    for recordings, recording in others:
        if held <= most_bytes:
            return
        recordings.remove(recording)
        held -= recording.nbytes


class RecordedSteps:
    """The steps of one batch: called with nothing at first, then with the last token (B,), gives logits (B, V).

    The logits are overwritten by the next step. Recordings are kept for the batches that come after this one.
    """

    @torch.inference_mode()
    def __init__(self, gpt: GPT, prefix: Tensor):
        self.gpt = gpt
        idle, weights = _idle.setdefault(gpt, {}).setdefault(len(prefix), []), addresses(gpt)
        idle[:] = [recording for recording in idle if recording.weights == weights]
        self.recording = idle.pop() if idle else Recording(gpt, len(prefix))
        weakref.finalize(self, idle.append, self.recording)
        self.recording.prefix.copy_(prefix)
        self.recording.cache.position.zero_()

    @property
    def prefix(self) -> Tensor:
        return self.recording.prefix

    def take(self, other: RecordedSteps, rows: Tensor) -> None:
        """Goes on where these rows (B,) of other steps are."""
        self.recording.cache.take(other.recording.cache, rows)
        torch.index_select(other.recording.tokens, 0, rows, out=self.recording.tokens)

    def __call__(self, last: Tensor | None) -> Tensor:
        recording = self.recording
        if last is not None:
            recording.token.copy_(last)
        if recording.graph is None:
            recording.work(self.gpt)
        else:
            recording.graph.replay()
        return recording.logits
