"""Where the time of a prediction goes: sixteen candidates, the four best saved.

    script/bench --only profile [--size bundled published] [--device cpu]

Drawing the tokens is measured in a few steps at lengths spread evenly over the picture and scaled to all of them;
torch.profiler says which operations its seconds go to. On a GPU "Python and the rest" is when it had nothing to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from figures import Figure, seconds
from subjects import PROMPT, Subject
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from clip_gen.hardware import tensor_float32
from clip_gen.images import to_pil
from clip_gen.networks.gpt import GPT
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.sampling.sampler import ROWS, Sampling, candidate_uniforms, draw, filtered_probabilities, sample_tokens
from clip_gen.serving.model_cache import Outputs

STEPS = 8  # of all that drawing a picture takes
PROFILED_RUNS = 3  # of these steps
DRAWING, OTHER, REST = "drawing the token", "adding, rotating, cache", "Python and the rest"
GROUPS = {  # what the names of torch's operations have in them
    DRAWING: (DRAWING,),
    "attention": ("attention", "embedding_bag", "softmax"),
    "matrix products": ("linear", "matmul", "addmm", "::mm", "bmm", "pack_mm"),
    "normalisation and activation": ("layer_norm", "gelu"),
}
KERNELS = {  # and those of a GPU's kernels
    DRAWING: ("_draw", "SoftMax"),
    "attention": ("_attend",),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitK"),
    "normalisation and activation": ("_add_norm", "Gelu"),
}
PROFILED = (*GROUPS, OTHER, REST)


def measure(subject: Subject) -> list[Figure]:
    model = subject.ours
    with profile(activities=[ProfilerActivity.CPU], acc_events=True):
        pass  # it complains unless the main thread was its first
    taken = subject.run(lambda: stages(model, subject.device, subject.times), ours=True)
    whole = sum(taken.values())
    return [Figure(name, part, share=part / whole) for name, part in taken.items()]


@torch.inference_mode()
def stages(model: ClipGen, device: torch.device, times: int) -> dict[str, float]:
    """Seconds of each stage."""
    config = model.config.gpt
    together = min(ROWS, model.at_a_time)
    tokens = torch.randint(0, config.codebook_size, (together, config.block_size), device=device)
    images = model.vqgan.decode(tokens)
    found = Generation([], [0.0] * 4, tokens[:1].expand(4, -1), 0, ROWS, {})
    outputs, settings = Outputs(), {"prompt": PROMPT, "candidates": ROWS, "model": model.config.name}

    def save() -> None:
        found.images[:] = to_pil(images[:1].expand(4, -1, -1, -1))
        outputs.save(found, settings, "png", 90)

    def took(work: Callable[[], object]) -> float:
        return seconds(work, device, times)

    def as_predicted(work: Callable[[], object]) -> Callable[[], object]:
        """As ClipGen.decode_and_score does it."""
        return tensor_float32(device, model.gpt.dtype != torch.float32)(work)

    return {
        "reading the prompt": took(lambda: model.embed_prompt(PROMPT)),
        **{f"sampling: {name}": part for name, part in sampling_stages(model.gpt, device, times).items()},
        "decoding": ROWS / together * took(as_predicted(lambda: model.vqgan.decode(tokens))),
        "ranking": ROWS / together * took(as_predicted(lambda: model.clip_encoder.encode_image(images))),
        "saving": took(save),
    }


@torch.inference_mode()
def sampling_stages(gpt: GPT, device: torch.device, times: int) -> dict[str, float]:
    """Seconds of drawing a batch of pictures, by kinds of operations."""
    if device.type == "cuda":
        return replayed_stages(gpt, device, times)
    total = gpt.config.block_size
    lengths = [(2 * step + 1) * total // (2 * STEPS) for step in range(STEPS)]
    cache, sampling = gpt.new_cache(ROWS), Sampling()
    gpt.start(torch.zeros(ROWS, gpt.config.n_embd, device=device), cache)
    token, uniform = torch.zeros(ROWS, dtype=torch.long, device=device), torch.rand(ROWS, device=device)

    def steps() -> None:
        """As sampling.Batch does it."""
        for length in lengths:
            cache.length = length
            logits = gpt.step(token, cache).float()
            with record_function(DRAWING):
                draw(filtered_probabilities(logits, sampling), uniform)

    taken = seconds(steps, device, times) * total / STEPS
    parts = profiled_seconds(lambda: [steps() for _ in range(PROFILED_RUNS)])
    # The profiler slows down what it watches, so it has the shares and the clock has the seconds.
    return {name: taken * parts[name] / sum(parts.values()) for name in PROFILED}


@torch.inference_mode()
def replayed_stages(gpt: GPT, device: torch.device, times: int) -> dict[str, float]:
    """The same of a GPU, where a whole picture is quickly drawn, and the steps are recorded."""
    embedding = torch.zeros(ROWS, gpt.config.embed_dim, device=device)
    uniforms = candidate_uniforms(0, range(ROWS), gpt.config.block_size)

    def picture() -> None:
        sample_tokens(gpt, embedding, uniforms, Sampling())

    taken = seconds(picture, device, times)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        picture()
        torch.cuda.synchronize()
    found = dict.fromkeys(PROFILED, 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = next((name for name, words in KERNELS.items() if any(word in event.name for word in words)), OTHER)
            found[name] += event.time_range.elapsed_us() / 1e6
    found[REST] = max(0.0, taken - sum(found.values()))
    return found


def profiled_seconds(work: Callable[[], object]) -> dict[str, float]:
    """Seconds that the work spends in each group of operations, under the profiler."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        began = time.perf_counter()
        work()
        whole = time.perf_counter() - began
    found = dict.fromkeys(PROFILED, 0.0)
    for event in profiler.events():
        found[group(event)] += event.self_cpu_time_total / 1e6
    found[REST] = max(0.0, whole - sum(found.values()))
    return found


def group(event: FunctionEvent) -> str:
    """That of the outermost operation around this one which has any."""
    found = OTHER
    while event is not None:
        found = next((name for name, words in GROUPS.items() if any(word in event.name for word in words)), found)
        event = event.cpu_parent
    return found
