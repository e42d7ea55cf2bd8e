"""From a prompt, a picture or both to ranked images."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clip_gen.hardware import choose_device, choose_dtype, one_thread, prefers_bfloat16, tensor_float32
from clip_gen.images import resized_square, to_pil, to_tensor
from clip_gen.known_words import KnownWords
from clip_gen.networks.mixing import embed_prompt, prompt_conditions, slerp
from clip_gen.sampling.batch_requests import Candidate, Request
from clip_gen.sampling.batch_sizes import pad_rows
from clip_gen.sampling.batcher import shared_batcher
from clip_gen.sampling.condition import Condition, open_picture
from clip_gen.sampling.inpainting import Inpainting, read_inpainting
from clip_gen.sampling.progress import Listener, Progress, fill_unsampled
from clip_gen.sampling.sampler import Sampling, Stopped, candidate_uniforms
from clip_gen.validation import MAX_SEED, check_request
from clip_gen.weights.model_folder import VOCABULARY, Networks, folder_sha256, load_networks, transformer_mismatch
from clip_gen.weights.tarball import WeightsFolder, open_weights

log = logging.getLogger(__name__)

__all__ = ["ClipGen", "Generation", "Progress", "Stopped"]

GPU_BATCH = 32  # images decoded and scored together
NEGATIVE_GUIDANCE = 3.0  # with a negative prompt, if guidance is left at 1
CPU_PATCH_BATCH = 4  # the same on a CPU, for images decoded in patches: twice as fast as one by one


@dataclass(frozen=True)
class Generation:
    """The images of one prompt, best first."""

    images: list[Image.Image]
    # Cosine of each image's CLIP embedding with the prompt's, which the bridge has moved, or with that of prompt and
    # picture mixed. If the model has a memory: mostly the cosine with what the image was drawn from.
    # If it has a likelihood_weight: plus this times the mean log-likelihood of the sampled tokens.
    # With a negative prompt: minus the cosine with its embedding. With a mask: plus the mean log-likelihood of the kept
    # tokens that follow a sampled one.
    scores: list[float]
    tokens: Tensor  # (num_outputs, T) int64, on the CPU
    seed: int
    guidance: float
    candidates: int  # drawn; without clip_rerank as many as are returned
    metrics: dict[str, float]  # queue_seconds, sampling_seconds, tokens_per_second, rows_in_batch
    warnings: list[str] = field(default_factory=list)  # about this prompt, its settings and the model
    notes: list[str] = field(default_factory=list)  # what was done to init_image

    @classmethod
    def of(cls, request: Request, best: list[Candidate], seed: int, warnings: list[str]) -> Generation:
        """What a finished request has drawn."""
        return cls(
            images=[candidate.image for candidate in best],
            scores=[candidate.score for candidate in best],
            tokens=torch.from_numpy(np.stack([candidate.tokens.cpu().numpy() for candidate in best])),
            seed=seed,
            guidance=request.sampling.guidance,
            candidates=len(request.uniforms),
            metrics=request.metrics,
            warnings=warnings,
            notes=[request.inpainting.note] if request.inpainting else [],
        )


class ClipGen:
    """A loaded model folder: text or a picture in, pictures out."""

    source: WeightsFolder | None = None  # keeps its files, because the weights are memory-mapped from them
    decodes_in_bfloat16 = False  # half the time for whole images; their difference from float32 is 40 dB below white
    loaded = "networks from elsewhere"  # or the parts with their sizes, and the seconds it took to load them

    def __init__(self, networks: Networks, device: torch.device, warnings: Sequence[str] = ()):
        self.config = networks.config
        self.warnings = list(warnings)  # about the model
        vocabulary, completions = networks.texts.get(VOCABULARY, ""), networks.config.bridge.completions
        self.words = KnownWords(networks.clip, vocabulary, completions)
        self.clip_encoder = networks.clip
        self.vqgan = networks.vqgan
        self.gpt = networks.gpt
        self.bridge = networks.bridge
        self.device = device

    @classmethod
    def load(cls, weights: str | Path | WeightsFolder, device: str = "auto", dtype: str | None = None) -> ClipGen:
        """Loads a model. Raises ModelFolderError for weights that cannot be used.

        weights: a model folder, a training's folder, a weights tar, a zip of a model folder, or a URL of a tar or zip.
        device: cpu, cuda, or auto for cuda if there is a GPU.
        dtype: of the transformer's matrices: float32, bfloat16, on an x86 CPU also float16, or auto for the fastest on
        this hardware. Default: CLIP_GEN_DTYPE, else auto. Unless it is float32, a CPU that multiplies bfloat16 decodes
        whole images in it.
        """
        started, chosen = time.monotonic(), choose_device(device)
        matrices = choose_dtype(dtype, chosen)
        source = weights if isinstance(weights, WeightsFolder) else open_weights(weights)
        with one_thread():
            networks = load_networks(source.path, chosen)
            networks.gpt.cast_for_inference(matrices)
            whole_images = chosen.type == "cpu" and networks.config.vqgan.patch == 1
            if whole_images:
                # A seventh faster for whole images, but a third slower for patches.
                networks.vqgan.decoder.to(memory_format=torch.channels_last)
        problem = transformer_mismatch(source.path)
        if problem:
            log.warning("%s: %s", source.path, problem)
        model = cls(networks, chosen, [f"this model: {problem}"] if problem else [])
        model.source = source
        fast = prefers_bfloat16(chosen, training=True)  # the products are as large as in training
        model.decodes_in_bfloat16 = whole_images and matrices != torch.float32 and fast
        parts = ("clip", "vqgan", "gpt")
        sizes = [f"{part} {(source.path / f'{part}.safetensors').stat().st_size / 1e6:.1f} MB" for part in parts]
        model.loaded = f"{', '.join(sizes)} in {time.monotonic() - started:.1f} seconds"
        return model

    @cached_property
    def sha256(self) -> str | None:
        """Of the model folder's files that make a difference, see `folder_sha256`. None for networks from elsewhere."""
        return self.source and folder_sha256(self.source.path)

    @cached_property
    def at_a_time(self) -> int:
        """How many images are decoded and scored together. The number is fixed on a CPU, so that the bytes and the
        score of an image do not depend on the others in its batch. To be read first in the thread that decodes.
        """
        if self.device.type == "cuda":
            return GPU_BATCH
        in_patches = self.config.vqgan.patch > 1
        return CPU_PATCH_BATCH if in_patches and self._is_order_independent(CPU_PATCH_BATCH) else 1

    def _is_order_independent(self, count: int) -> bool:
        """Whether images of a batch have the same bits at every position. With several threads they may not: torch
        rounds the numbers that do not fill a vector register differently, and their positions depend on the threads.
        """
        gpt, generator = self.config.gpt, torch.Generator().manual_seed(0)
        tokens = torch.randint(gpt.codebook_size, (count, gpt.block_size), generator=generator)
        text = torch.ones(1, gpt.embed_dim)
        images, scores = self.decode_and_score(tokens, text)
        for shift in range(1, count):
            shifted, their_scores = self.decode_and_score(tokens.roll(shift, dims=0), text)
            if not torch.equal(shifted.roll(-shift, dims=0), images):
                return False
            if their_scores != scores[-shift:] + scores[:-shift]:
                return False
        return True

    def generate(
        self,
        prompt: str = "",
        candidates: int = 16,
        num_outputs: int = 4,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
        guidance: float = 1.0,
        seed: int | None = None,
        clip_rerank: bool = True,
        should_stop: Callable[[], bool] | None = None,
        *,
        image: str | Path | Image.Image | None = None,
        image_weight: float = 0.5,
        negative_prompt: str = "",
        init_image: str | Path | Image.Image | None = None,
        mask: str | Path | Image.Image | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        progress_seconds: float = 0.5,
        previews: bool = False,
    ) -> Generation:
        """Draws `candidates` images of the prompt and returns the best `num_outputs`, best first.

        image: a picture or its file, to draw variations of, or to mix with the prompt; image_weight: its share then.
        negative_prompt: what not to show; guidance pushes away from it, and if guidance is 1 it becomes 3.
        init_image, mask: a picture, and one of the same shape that is white where the first is redrawn; see
        docs/prompts.md. The prompt says what the whole picture shows.
        on_progress: called in this thread with the progress, at most every progress_seconds, and once at the end;
        previews: with a picture too, of the best candidate so far, gray where it is not drawn yet.

        Candidate i of a seed is the same image whatever the number of candidates. Without clip_rerank the first
        candidates are returned in their order. With settings that always take the likeliest token one is returned,
        because all would be the same. Raises Stopped once should_stop(), called before every token, returns True;
        ValueError for a value out of its range. Thread-safe.
        """
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
        steering = {"image_weight": image_weight, "negative_prompt": negative_prompt}
        others = settings | steering | {"init_image": init_image, "mask": mask}
        check_request(prompt, candidates, num_outputs, seed, clip_rerank, image, **others)
        condition = Condition(prompt, None if image is None else open_picture(image), **steering)
        sampling, warnings = self._choose_sampling(condition, **settings)
        if sampling.greedy:
            candidates = num_outputs = 1
        elif not clip_rerank:
            candidates = num_outputs  # the others would not be returned
        inpainting = None
        if init_image is not None:
            inpainting = read_inpainting(init_image, mask, self.config.vqgan.resolution, self.device)
            log.info(inpainting.note)
        seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed
        numbers = candidate_uniforms(seed, range(candidates), self.config.gpt.block_size + 1)
        uniforms, chances = numbers[:, :-1], numbers[:, -1]
        best_only = num_outputs if clip_rerank else None
        listener = None if on_progress is None else Listener(on_progress, progress_seconds, previews)
        request = Request(self, condition, uniforms, sampling, best_only, should_stop, inpainting, listener, chances)
        best = shared_batcher(self.device).draw(request)
        if on_progress is not None:
            on_progress(request.progress(uniforms.numel(), best[0].image if previews else None))
        return Generation.of(request, best, seed, self.warnings + warnings)

    def _choose_sampling(
        self, condition: Condition, temperature: float, top_k: int, top_p: float, guidance: float
    ) -> tuple[Sampling, list[str]]:
        """With warnings about the request, which are logged too."""
        raised = bool(condition.negative_prompt) and guidance == 1
        numbers = {"temperature": temperature, "top_p": top_p, "guidance": NEGATIVE_GUIDANCE if raised else guidance}
        # Python's own numbers, because torch takes no Fraction.
        sampling = Sampling(top_k=int(top_k), **{name: float(value) for name, value in numbers.items()})
        warnings = self.warnings_about(condition, sampling)
        if raised:
            warnings.append(
                f"guidance is 1, with which a negative prompt does little: it is {NEGATIVE_GUIDANCE:g} here"
            )
        for sentence in warnings:
            log.warning(sentence)
        return sampling, warnings

    def warnings_about(self, condition: Condition, sampling: Sampling) -> list[str]:
        """Warnings about what is asked for and these settings."""
        found = self.words.warnings(condition)
        if sampling.greedy:
            settings = " and ".join(f"{name} is {getattr(sampling, name):g}" for name in sampling.greedy)
            found.append(f"{settings}: all candidates would be the same picture, so one is drawn and returned")
        elif sampling.top_k >= self.config.gpt.codebook_size:
            found.append(f"top_k is {sampling.top_k}, which does nothing: this model has no more tokens")
        return found

    @property
    def decode_threads(self) -> int:
        """CPU threads to decode with. For small images starting several costs more than it saves."""
        return 1 if self.config.vqgan.patch > 1 else shared_batcher(self.device).max_threads

    def decode(
        self, tokens: Tensor, embeddings: Tensor, inpaintings: Sequence[Inpainting | None] = ()
    ) -> list[tuple[Image.Image, float]]:
        """Images and scores of at most at_a_time candidates, as decode_and_score has them, of tokens (n, T)."""
        count = len(tokens)
        if self.device.type == "cpu":
            tokens, embeddings = (pad_rows(part, self.at_a_time) for part in (tokens, embeddings))
        images, scores = self.decode_and_score(tokens, embeddings, inpaintings)
        return list(zip(to_pil(images[:count]), scores[:count], strict=True))

    def kept_tokens(self, inpainting: Inpainting) -> Tensor:
        """The tokens (T,) of a picture, and -1 for those that its mask redraws."""
        tokens = self.vqgan.encode(inpainting.picture[None])[0]
        return tokens.masked_fill(inpainting.redrawn_tokens(self.config.vqgan), -1)

    @torch.inference_mode()
    def preview(
        self, tokens: Tensor, embeddings: Tensor, inpainting: Inpainting | None = None
    ) -> list[tuple[Image.Image, float]]:
        """As `decode`, of unfinished candidates: tokens (n, T), -1 where there is none yet, which becomes gray.

        The scores are those of the pictures as decoded with a fill, see fill_unsampled.
        """
        config = self.config.vqgan
        filled = fill_unsampled(tokens, config.grid)
        images, scores = self.decode_and_score(filled, embeddings, [inpainting] * len(tokens))
        missing = (tokens < 0).unflatten(1, (config.grid, config.grid))[:, None].float()
        images = images * (1 - F.interpolate(missing, scale_factor=config.resolution // config.grid))
        if inpainting is not None:
            images = torch.stack([inpainting.paste(image) for image in images])
        return list(zip(to_pil(images), scores, strict=True))

    def embed(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The embeddings (1, E) of what to show, and of what not to show if that is given.

        Images are drawn from them and scored against them.
        """
        negative = self.embed_prompt(condition.negative_prompt) if condition.negative_prompt else None
        if condition.picture is None:
            return self.embed_prompt(condition.prompt), negative
        picture = self.embed_picture(condition.picture)
        if not condition.prompt:
            return picture, negative
        return slerp(self.embed_prompt(condition.prompt), picture, condition.image_weight), negative

    def conditions(self, request: Request) -> Tensor:
        """What each candidate is drawn from, (K, E): what the bridge makes of a text, or the embedding of a picture."""
        asked, count = request.condition, len(request.uniforms)
        weight = 0 if asked.picture is None else asked.image_weight if asked.prompt else 1
        if weight == 1:
            return request.embedding.expand(count, -1)
        if weight == 0 and request.inpainting is None:  # with a mask, the kept part shows what is unsaid
            return prompt_conditions(self.clip_encoder, self.bridge, asked.prompt, request.embedding, request.chances)
        return self.bridge.conditions(request.embedding, request.chances[None])

    @property
    def likelihood_weight(self) -> float:
        return self.bridge.config.likelihood_weight

    def embed_prompt(self, prompt: str) -> Tensor:
        """A prompt's embedding (1, E), moved by the bridge."""
        return embed_prompt(self.clip_encoder, self.bridge, prompt)

    def embed_picture(self, picture: Image.Image) -> Tensor:
        """A picture's embedding (1, E), of its central square at the model's own size, as in training."""
        square = resized_square(picture, self.config.vqgan.resolution)
        return self.clip_encoder.encode_image(to_tensor([square]).to(self.device))

    @torch.inference_mode()
    def decode_and_score(
        self, tokens: Tensor, embedding: Tensor, inpaintings: Sequence[Inpainting | None] = ()
    ) -> tuple[Tensor, list[float]]:
        """The images (B, 3, S, S) of tokens (B, T), and the products of their CLIP embeddings with `embedding`.

        embedding: (B, E), or (1, E) for all. inpaintings: the pictures that the first images are pasted into, None for
        whole images. ValueError for a product that is not finite.
        """
        with tensor_float32(self.device, self.gpt.dtype != torch.float32):
            with torch.autocast("cpu", torch.bfloat16, self.decodes_in_bfloat16):
                images = self.vqgan.decode(tokens).float()
            # Not strict: whole images and rows that pad the batch have no inpainting.
            for image, inpainting in zip(images, inpaintings, strict=False):
                if inpainting is not None:
                    image.copy_(inpainting.paste(image))
            scores = (self.clip_encoder.encode_image(images) * embedding).sum(dim=1).tolist()
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"the scores are {scores[:4]}: the weights of this model's CLIP or VQGAN are damaged")
        return images, scores
