"""Prompt -> ranked images."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip_gen.hardware import choose_device, choose_dtype, one_thread, tensor_float32
from clip_gen.images import to_pil
from clip_gen.sampling.batcher import Busy, shared_batcher
from clip_gen.sampling.sampler import Sampling, Stopped, padded
from clip_gen.validation import MAX_SEED, check_request
from clip_gen.weights.model_folder import Networks, load_networks, why_noise
from clip_gen.weights.tarball import WeightsFolder, open_weights

log = logging.getLogger(__name__)

__all__ = ["Busy", "ClipGen", "Generation", "Stopped"]

AT_A_TIME = 32  # pictures decoded and ranked together on a GPU
SMALL_AT_A_TIME = 4  # and on a CPU, of those decoded in patches: twice as fast as one by one


@dataclass(frozen=True)
class Generation:
    """What one prompt gave, best first."""

    images: list[Image.Image]
    scores: list[float]  # CLIP cosine of each image with the prompt where the bridge puts it
    tokens: Tensor  # (num_outputs, T) int64, on the CPU
    seed: int
    candidates: int  # how many were drawn: without clip_rerank no more than are returned
    metrics: dict[str, float]  # queue_seconds, sampling_seconds, tokens_per_second, rows_in_batch
    warnings: list[str] = field(default_factory=list)  # sentences about this prompt, its settings and the model


class ClipGen:
    """A loaded model folder: text in, pictures out."""

    source: WeightsFolder | None = None  # kept, since the weights stay in its files

    def __init__(self, networks: Networks, device: torch.device, warnings: Sequence[str] = ()):
        self.config = networks.config
        self.warnings = list(warnings)  # what is wrong with the model, in sentences
        self.clip_encoder = networks.clip
        self.vqgan = networks.vqgan
        self.gpt = networks.gpt
        self.bridge = networks.bridge
        self.device = device

    @classmethod
    def load(cls, weights: str | Path | WeightsFolder, device: str = "auto", dtype: str | None = None) -> ClipGen:
        """Reads a model. device: cpu, cuda, or auto for cuda where there is one.

        weights: a model folder, a training's folder, a weights tar, a zip of a model folder, or a URL of a tar or zip.
        dtype: of the transformer's matrices; float32, bfloat16, on an x86 CPU also float16; auto for what suits the
        hardware best. If not given, CLIP_GEN_DTYPE says, else auto. ModelFolderError for weights that cannot be used.
        """
        chosen = choose_device(device)
        source = weights if isinstance(weights, WeightsFolder) else open_weights(weights)
        with one_thread():
            networks = load_networks(source.path, chosen)
            networks.gpt.cast_for_inference(choose_dtype(dtype, chosen))
            if chosen.type == "cpu" and networks.config.vqgan.patch == 1:
                # A seventh faster over whole pictures; over patches, whose images are small, a third slower.
                networks.vqgan.decoder.to(memory_format=torch.channels_last)
        problem = why_noise(source.path)
        if problem:
            log.warning("%s: %s", source.path, problem)
        model = cls(networks, chosen, [f"this model: {problem}"] if problem else [])
        model.source = source
        return model

    @cached_property
    def at_a_time(self) -> int:
        """How many pictures are decoded and ranked together. On a CPU always as many, so that a picture's bytes and its
        score do not depend on the ones beside it; to be asked first in the thread that decodes.
        """
        if self.device.type == "cuda":
            return AT_A_TIME
        small = self.config.vqgan.patch > 1
        return SMALL_AT_A_TIME if small and self._alike_in_every_place(SMALL_AT_A_TIME) else 1

    def _alike_in_every_place(self, count: int) -> bool:
        """Whether each of so many pictures has the same bits in each place. Of what several threads share out, torch
        rounds the last few numbers of each thread's otherwise, where they do not fill its vectors.
        """
        gpt, generator = self.config.gpt, torch.Generator().manual_seed(0)
        tokens = torch.randint(gpt.codebook_size, (count, gpt.block_size), generator=generator)
        text = torch.ones(1, gpt.embed_dim)
        images, scores = self.decode_and_score(tokens, text)
        for turn in range(1, count):
            turned, their_scores = self.decode_and_score(tokens.roll(turn, dims=0), text)
            if not torch.equal(turned.roll(-turn, dims=0), images) or their_scores != scores[-turn:] + scores[:-turn]:
                return False
        return True

    def generate(
        self,
        prompt: str,
        candidates: int = 16,
        num_outputs: int = 4,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
        guidance: float = 1.0,
        seed: int | None = None,
        clip_rerank: bool = True,
        should_stop: Callable[[], bool] | None = None,
    ) -> Generation:
        """Samples `candidates` pictures of the prompt and returns `num_outputs`, best first by CLIP.

        Candidate i of a seed is the same picture whatever the number of candidates. Without clip_rerank the first
        ones sampled are returned, scored all the same. Calls from several threads share the device.
        Settings that always take the likeliest token make all candidates alike: then one is drawn and returned.
        ValueError when a value is out of its range; Stopped when should_stop, asked before every token, says so; Busy
        when too many candidates wait already.
        """
        numbers = {"temperature": temperature, "top_p": top_p, "guidance": guidance}
        check_request(prompt, candidates, num_outputs, seed, clip_rerank, top_k=top_k, **numbers)
        # As Python's own numbers: torch takes no Fraction.
        sampling = Sampling(top_k=int(top_k), **{name: float(value) for name, value in numbers.items()})
        if sampling.greedy:
            candidates = num_outputs = 1
        elif not clip_rerank:
            candidates = num_outputs  # nobody would look at the others
        if seed is None:
            seed = secrets.randbelow(MAX_SEED + 1)
        warnings = self.warnings_about(prompt, sampling)
        for sentence in warnings:
            log.warning(sentence)

        device, asked = shared_batcher(self.device), time.monotonic()
        # Operations on small pictures are too short for several threads; see batching.SHARED_PRODUCT.
        threads = 1 if self.config.vqgan.patch > 1 else device.most_threads
        at_a_time, embedding = device.run(lambda: (self.at_a_time, self.embed_prompt(prompt)), threads, leads_up=True)
        sampled = device.sample(self.gpt, embedding, candidates, seed, sampling, should_stop, asked)
        scores: list[float] = []
        best: dict[int, Image.Image] = {}  # of those looked at so far
        for tokens in sampled.tokens.split(at_a_time):
            if should_stop is not None and should_stop():
                raise Stopped
            found = device.share(self._pictures, [(row, embedding[0]) for row in tokens], at_a_time, threads)
            best |= enumerate((picture for picture, _ in found), len(scores))
            scores += [score for _, score in found]
            ranked = sorted(best, key=scores.__getitem__, reverse=True) if clip_rerank else sorted(best)
            best = {candidate: best[candidate] for candidate in ranked[:num_outputs]}
        return Generation(
            list(best.values()),
            [scores[candidate] for candidate in best],
            torch.from_numpy(sampled.tokens.cpu().numpy()[list(best)]),  # torch might start helpers for it
            seed,
            candidates,
            sampled.metrics,
            self.warnings + warnings,
        )

    def warnings_about(self, prompt: str, sampling: Sampling) -> list[str]:
        """What a caller may not expect of this prompt and these settings, in sentences."""
        found = []
        lost = self.clip_encoder.tokenize.left_out(prompt)
        if lost:
            found.append(f"the prompt is longer than this model's CLIP reads; its end is left out: {lost!r}")
        if sampling.greedy:
            settings = " and ".join(f"{name} is {getattr(sampling, name):g}" for name in sampling.greedy)
            found.append(f"{settings}: all candidates would be the same picture, so one is drawn and returned")
        elif sampling.top_k >= self.config.gpt.codebook_size:
            found.append(f"top_k is {sampling.top_k}, which does nothing: this model has no more tokens")
        return found

    def _pictures(self, rows: list[tuple[Tensor, Tensor]]) -> list[tuple[Image.Image, float]]:
        """Pictures and scores of candidates, each given by its tokens (T,) and its prompt's embedding (E,)."""
        tokens, embeddings = map(torch.stack, zip(*rows, strict=True))
        if self.device.type == "cpu":
            tokens, embeddings = (padded(part, self.at_a_time) for part in (tokens, embeddings))
        images, scores = self.decode_and_score(tokens, embeddings)
        return list(zip(to_pil(images[: len(rows)]), scores[: len(rows)], strict=True))

    def embed_prompt(self, prompt: str) -> Tensor:
        """A prompt's embedding (1, E) where the bridge puts it: pictures are drawn from there, and ranked by how near
        they come.
        """
        return self.bridge(self.clip_encoder.encode_text([prompt]))

    @torch.inference_mode()
    def decode_and_score(self, tokens: Tensor, embedding: Tensor) -> tuple[Tensor, list[float]]:
        """The images (B, 3, S, S) of tokens (B, T), and their CLIP cosines with their prompts' embeddings, (B, E), or
        with that of one prompt, (1, E).
        """
        with tensor_float32(self.device, self.gpt.dtype != torch.float32):
            images = self.vqgan.decode(tokens)
            scores = (self.clip_encoder.encode_image(images) * embedding).sum(dim=1).tolist()
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"the scores are {scores[:4]}: what this model's CLIP or VQGAN was saved with is damaged")
        return images, scores
