"""Transformer steps on a GPU: recorded once as a CUDA graph, then replayed for every token of every batch.

Otherwise the GPU waits for Python: a step of 24 layers is some 200 small kernels. A CUDA graph launches all of them at
once, but always on the same memory. So the cache has its full size from the start, and the next position is a number on
the device, which the kernels read.

On a CPU the same steps run in plain PyTorch, for tests.
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

WARMUP_STEPS = 2  # before recording: libraries initialise and Triton compiles

log = logging.getLogger(__name__)


class StaticCache(KVCache):
    """A cache of fixed size: attention reads all positions, and the next position is a number on the device."""

    def __init__(self, config: GPTConfig, rows: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(config, rows, device=device, dtype=dtype)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self.all_positions = torch.arange(config.block_size, device=device)

    @property
    def position(self) -> Tensor:
        return self._position

    def advance(self) -> None:
        self._position += 1

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, key[:, :, None])
        self.values[layer].index_copy_(2, self.position, value[:, :, None])
        return self.keys[layer], self.values[layer]


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether this is a GPU on which Triton works. Triton needs a C compiler and Python headers.

    Logs a warning for a GPU without it.
    """
    if device.type != "cuda":
        return False
    try:
        from clip_gen.sampling.triton_kernels import check_toolchain  # needs Triton

        check_toolchain()
    except (ImportError, RuntimeError, AssertionError, OSError, subprocess.SubprocessError) as error:
        log.warning("sampling is slower than it could be, because Triton does not work here: %s", error)
        return False
    return True


def plain_step(gpt: GPT, x: Tensor, cache: StaticCache) -> Tensor:
    """Logits (B, V) for the next position from its input (B, n_embd), in plain PyTorch."""
    cache.mask = (cache.all_positions <= cache.position).view(1, 1, 1, -1)
    return gpt.step_from_input(x, cache)


def fused_step(gpt: GPT, x: Tensor, cache: StaticCache) -> Tensor:
    """As plain_step but for rounding, in half as many kernels: 8 per layer."""
    from clip_gen.sampling.triton_kernels import add_norm, attend  # needs Triton

    stream, branch = x + gpt.position_embedding.weight[cache.position], None
    if cache.sketched is not None:
        stream = stream + cache.sketched[:, cache.position][:, 0]
    for layer, block in enumerate(gpt.blocks):
        qkv = block.attn.qkv(add_norm(stream, branch, block.ln_1, gpt.dtype))
        y = attend(qkv, gpt.rotation, cache.keys[layer], cache.values[layer], cache.position)
        branch = block.attn.proj(y)
        branch = block.mlp(add_norm(stream, branch, block.ln_2, gpt.dtype))
    cache.advance()
    return gpt.head(add_norm(stream, branch, gpt.ln_f, stream.dtype))


def weight_addresses(gpt: GPT) -> list[int]:
    """The addresses of the weights. A graph reads from them, so it is invalid after the weights were moved."""
    return [tensor.data_ptr() for tensor in (*gpt.parameters(), *gpt.buffers())]


class Recording:
    """The buffers of one batch of `rows`, and the graph of its step. Holds no reference to the GPT."""

    def __init__(self, gpt: GPT, rows: int):
        config, device = gpt.config, gpt.device
        self.step = fused_step if has_kernels(device) else plain_step
        self.weights = weight_addresses(gpt)
        self.cache = StaticCache(config, rows, device=device, dtype=gpt.dtype)
        self.prefix = torch.zeros(rows, config.n_embd, device=device)
        self.cache.sketched = gpt.sketched(self.prefix)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, config.block_size + 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None  # (rows, V), of the last step
        self.graph = self._record(gpt) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        return self.cache.keys.nbytes + self.cache.values.nbytes

    def run(self, gpt: GPT) -> None:
        """Runs one step: from `token`, or at position 0 from `prefix`, to `logits`."""
        cache, config = self.cache, gpt.config
        first = cache.position == 0
        if gpt.around is None:
            x = torch.where(first, self.prefix, gpt.token_embedding(self.token))
        else:
            # At position 0 there is no token yet: write "unknown" to the entry for neighbours outside the grid.
            previous = torch.where(first, config.block_size, cache.position - 1)
            self.tokens.index_copy_(1, previous, torch.where(first, config.codebook_size, self.token)[:, None])
            x = gpt.neighbour_input(cache.position, self.prefix, self.tokens)
        self.logits = self.step(gpt, x, cache)

    def _record(self, gpt: GPT) -> torch.cuda.CUDAGraph:
        warmup, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        warmup.wait_stream(torch.cuda.current_stream())
        # The head is float32: 5 % of a step's time, and almost nothing with TF32.
        with tensor_float32(self.token.device, gpt.dtype != torch.float32):
            with torch.cuda.stream(warmup):
                for _ in range(WARMUP_STEPS):
                    self.run(gpt)
                self.cache.position.zero_()
            torch.cuda.current_stream().wait_stream(warmup)
            # thread_local: other threads keep using the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.run(gpt)
        return graph


_idle: weakref.WeakKeyDictionary[GPT, dict[int, list[Recording]]] = weakref.WeakKeyDictionary()


def forget(gpt: GPT) -> None:
    """Deletes the recordings of a transformer that will not sample again soon."""
    _idle.pop(gpt, None)


def forget_idle(max_bytes: float, gpt: GPT, rows: int) -> None:
    """Deletes idle recordings on this transformer's device until the rest hold at most max_bytes.

    The one that the next batch will use, of so many rows of this transformer, is kept and does not count.
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
        if held <= max_bytes:
            return
        recordings.remove(recording)
        held -= recording.nbytes


class RecordedSteps:
    """The steps of one batch: called with None first, then with the last token (B,); returns logits (B, V).

    The next step overwrites the logits. The recording is reused by later batches.
    """

    @torch.inference_mode()
    def __init__(self, gpt: GPT, prefix: Tensor):
        self.gpt = gpt
        idle, weights = _idle.setdefault(gpt, {}).setdefault(len(prefix), []), weight_addresses(gpt)
        idle[:] = [recording for recording in idle if recording.weights == weights]
        self.recording = idle.pop() if idle else Recording(gpt, len(prefix))
        weakref.finalize(self, idle.append, self.recording)
        self.recording.prefix.copy_(prefix)
        if gpt.sketch is not None:
            self.recording.cache.sketched.copy_(gpt.sketched_one_by_one(prefix))
        self.recording.cache.position.zero_()

    def __call__(self, last: Tensor | None) -> Tensor:
        recording = self.recording
        if last is not None:
            recording.token.copy_(last)
        if recording.graph is None:
            recording.run(self.gpt)
        else:
            recording.graph.replay()
        return recording.logits
