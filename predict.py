"""Cog's predictor: a prompt or a picture in, the best pictures out."""

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from cog import BaseRunner, Input, Path, concurrent

from clip_gen.files import set_compile_cache_folders, shortened
from clip_gen.serving.inputs import checked, read_inputs
from clip_gen.serving.slots import Slots, max_prediction_seconds
from clip_gen.serving.watchdog import stop_watchdog, worker_folder
from clip_gen.validation import check_request, without_effect

if TYPE_CHECKING:
    from clip_gen.pipeline import Generation

T = TypeVar("T")


class Predictor(BaseRunner):
    """Draws with the model it was started with, or with one that a request names."""

    async def setup(self, weights: str | None = None) -> None:
        """Loads the model. weights: COG_WEIGHTS, the name of a folder or a tar, or a URL."""
        started = time.monotonic()
        set_compile_cache_folders()
        # Imported here: torch takes seconds, and script/serve reads the inputs below without it.
        from clip_gen.serving.model_cache import Models
        from clip_gen.serving.outputs import Outputs
        from clip_gen.weights.default_model import default_model

        # First, so that the server also ends if loading is killed for want of memory.
        self.outputs = Outputs(worker_folder("clip-gen-"))
        try:
            self.slots = Slots(max_prediction_seconds())
            source, reason = default_model(weights)
            print(f"loading {shortened(source)}: {reason}", flush=True)
            self.models = Models(source)
        except BaseException:
            stop_watchdog()  # so that the server answers why its setup failed
            raise
        # asyncio's own executor has fewer threads on a small machine.
        self.drawing = ThreadPoolExecutor(SLOTS, "drawing")
        model, seconds = self.models.own, time.monotonic() - started
        print(f"model: {model.config.name} from {shortened(source)} on {model.device}: {reason}")
        print(f"loaded: {model.loaded}; the setup took {seconds:.1f} seconds")

    # 12 slots serve 8 clients: Cog frees a slot a moment after it has sent the reply, so a client that asks again at
    # once may need a second slot. Cog 0.23.1 also answers 409 when two requests take a slot at the same time, because
    # it does not wait for its lock: a few in a thousand on a busy machine, with 32 slots as with 12.
    @concurrent(max=12)
    async def run(
        self,
        prompt: str = Input(description="What to draw. With weights: a cat:2 | a dog:0.5", default="", max_length=1000),
        image: Path | None = Input(
            description="A picture to draw variations of, or to mix with the prompt.", default=None, accept="image/*"
        ),
        image_weight: float = Input(
            description="Share of the image beside a prompt. 0: the prompt alone.", default=0.5, ge=0, le=1
        ),
        negative_prompt: str = Input(
            description="What the pictures should not show. Guidance of 1 becomes 3.", default="", max_length=1000
        ),
        init_image: Path | None = Input(
            description="A picture to redraw where mask is white.", default=None, accept="image/*"
        ),
        mask: Path | None = Input(
            description="A picture of init_image's shape: white is redrawn.", default=None, accept="image/*"
        ),
        num_outputs: int = Input(description="Number of pictures to return, best first.", default=4, ge=1, le=64),
        candidates: int = Input(description="Number of pictures to draw and choose from.", default=16, ge=1, le=256),
        clip_rerank: bool = Input(description="Return the best-ranked pictures. Off: the first ones.", default=True),
        top_k: int = Input(description="Sample from the k likeliest tokens. 0: all tokens.", default=0, ge=0, le=16384),
        top_p: float = Input(
            description="Sample from the likeliest tokens with this total probability. 1: all.", default=1.0, ge=0, le=1
        ),
        temperature: float = Input(
            description="Higher values vary more. 0: always the likeliest token.", default=1.0, ge=0, le=10
        ),
        guidance: float = Input(description="Strength of classifier-free guidance. 1: off.", default=1.0, ge=0, le=20),
        seed: int | None = Input(
            description="The same seed draws the same pictures. Blank: random.", default=None, ge=0, le=2147483647
        ),
        output_format: str = Input(description="File type.", default="png", choices=["png", "webp", "jpg"]),
        output_quality: int = Input(
            description="Quality of webp and jpg. png is always lossless, webp at 100.", default=90, ge=0, le=100
        ),
        output_size: str = Input(
            description="Size of the pictures. 1x: the model's own.", default="1x", choices=["1x", "2x", "4x"]
        ),
        output_grid: bool = Input(description="Return a contact sheet of all pictures first.", default=False),
        output_metadata: bool = Input(description="Write the prompt and the settings into each file.", default=True),
        replicate_weights: str | None = Input(
            description="https URL of a weights tar. Leave blank for the server's model.", default=None
        ),
        **unknown: object,
    ) -> list[Path]:
        """Draws, ranks and saves pictures. Checks its inputs, because Cog checks none when it finds no schema file."""
        if "images" in unknown:
            raise ValueError("this server draws pictures; for trainings, start another with --x-mode train")
        async with self.slots.one():
            inputs = checked(
                INPUTS,
                prompt=prompt,
                image=image,
                image_weight=image_weight,
                negative_prompt=negative_prompt,
                init_image=init_image,
                mask=mask,
                num_outputs=num_outputs,
                candidates=candidates,
                clip_rerank=clip_rerank,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                guidance=guidance,
                seed=seed,
                output_format=output_format,
                output_quality=output_quality,
                output_size=output_size,
                output_grid=output_grid,
                output_metadata=output_metadata,
                replicate_weights=replicate_weights,
                **unknown,
            )
            for sentence in without_effect(inputs, {name: field.info.default for name, field in INPUTS.items()}):
                print(f"warning: {sentence}")
            return await self._draw(**inputs)

    async def _draw(
        self,
        output_format: str,
        output_quality: int,
        output_size: str,
        output_grid: bool,
        output_metadata: bool,
        replicate_weights: str | None,
        **settings: object,
    ) -> list[Path]:
        """settings: the arguments of ClipGen.generate."""
        check_request(**settings)
        stop = threading.Event()
        try:
            model = await self.models.get(replicate_weights, stop.is_set)
            if replicate_weights:
                print(f"model: {model.config.name} from {shortened(replicate_weights)}: replicate_weights names it")
            for sentence in model.warnings:
                print(f"warning: {sentence}")
            from clip_gen.enlarging import LANCZOS, enlarger, upscaler_name  # imports torch, as in setup
            from clip_gen.picture_files import description
            from clip_gen.progress_bar import ProgressLog

            watched = {"should_stop": stop.is_set, "on_progress": ProgressLog()}
            result = await self._in_thread(functools.partial(model.generate, **settings, **watched))
            outputs = {"output_format": output_format, "output_quality": output_quality, "output_size": output_size}
            metadata = None
            if output_metadata:
                metadata = await asyncio.to_thread(description, model, result, settings | outputs)
            if upscaler_name(output_size) not in (None, LANCZOS):
                print(f"output_size is {output_size}: Real-ESRGAN enlarges the pictures")
            enlarge = await self._in_thread(enlarger, output_size, model.device, stop.is_set)
            saving = self.outputs.save, result, metadata, output_format, output_quality, output_grid, enlarge
            files = await self._in_thread(*saving)
        finally:
            stop.set()  # a cancelled prediction ends at its next token, or its download within a second
        self._record(result, model.config.name)
        return [Path(file) for file in files]

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """What the function returns, called in this prediction's context, so that its logs have what is logged."""
        in_context = functools.partial(contextvars.copy_context().run, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self.drawing, in_context)

    def _record(self, result: "Generation", model: str) -> None:
        for sentence in result.notes:
            print(sentence)
        scores = [round(score, 4) for score in result.scores]
        print(f"seed: {result.seed}\nscores: {scores}")
        metrics = {"image_output_count": len(scores), "candidates": result.candidates, "seed": result.seed}
        metrics |= {"model": model, "best_score": max(scores), "scores": scores} | result.metrics
        for name, value in metrics.items():
            self.record_metric(name, value)


INPUTS = read_inputs(Predictor.run)
SLOTS = Predictor.run.__cog_concurrent_max__  # predictions at once
