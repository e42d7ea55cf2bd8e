"""What Cog serves: a prompt in, its best pictures out."""

import asyncio
import contextlib
import contextvars
import functools
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import coglet
from cog import BaseRunner, Input, Path, concurrent

from clip_gen.serving.inputs import checked
from clip_gen.serving.model_cache import Models, Outputs
from clip_gen.serving.signature import read_signature
from clip_gen.serving.slots import Slots, longest_prediction
from clip_gen.serving.watchdog import server_ends_with_worker
from clip_gen.validation import check_request, without_effect
from clip_gen.weights.default_model import own_weights


class Predictor(BaseRunner):
    """Draws with the model it was started with, or with one that a request names."""

    async def setup(self, weights: str | None = None) -> None:
        """Loads the model. weights: COG_WEIGHTS as Cog hands it over, the text of a folder, a tar or a URL."""
        self.outputs = Outputs()
        served = coglet.server.active  # not script/predict
        self.slots = Slots(longest_prediction() if served else None)
        with server_ends_with_worker(self.outputs.folder) if served else contextlib.nullcontext():
            source, reason = own_weights(weights)
            signature = read_signature(pathlib.Path(__file__), "Predictor")
            self.inputs = signature.inputs
            self.models = Models(source)
            # asyncio's own has fewer threads on a small machine.
            self.drawing = ThreadPoolExecutor(signature.slots, "drawing")
        print(f"model: {self.models.own.config.name} from {source[:100]} on {self.models.own.device}: {reason}")

    # More than eight, because Cog frees a slot a moment after its reply is sent: of eight clients that ask again at
    # once, one now and then heard 409 with eight slots. However many there are, Cog 0.23.1 answers 409 to one of two
    # that reach for a slot in the same instant (it tries the lock of its pool and does not wait): some in a thousand on
    # a busy machine, with 32 slots as with 12.
    @concurrent(max=12)
    async def run(
        self,
        prompt: str = Input(description="What to draw.", min_length=1, max_length=1000),
        num_outputs: int = Input(description="Pictures to return, best first.", default=4, ge=1, le=64),
        candidates: int = Input(description="Pictures to draw and choose from.", default=16, ge=1, le=256),
        clip_rerank: bool = Input(description="Let CLIP choose and sort. Off: the first drawn.", default=True),
        top_k: int = Input(description="Sample from the k likeliest tokens. 0: all.", default=0, ge=0, le=16384),
        top_p: float = Input(
            description="Sample from the likeliest tokens that make up this share. 1: all.", default=1.0, ge=0, le=1
        ),
        temperature: float = Input(
            description="More is wilder; 0 always takes the likeliest token, which is often plain ground.",
            default=1.0,
            ge=0,
            le=10,
        ),
        guidance: float = Input(
            description="How hard to push towards the prompt. 1: as the model learnt it.", default=1.0, ge=0, le=20
        ),
        seed: int | None = Input(
            description="The same seed draws the same pictures. Leave blank for a random one.",
            default=None,
            ge=0,
            le=2147483647,
        ),
        output_format: str = Input(description="File type.", default="png", choices=["png", "webp", "jpg"]),
        output_quality: int = Input(
            description="For webp and jpg; webp loses nothing at 100, png never.", default=90, ge=0, le=100
        ),
        output_metadata: bool = Input(description="Write the prompt and the settings into each file.", default=True),
        replicate_weights: str | None = Input(
            description="https URL of a weights tar made by training. Leave blank for the model served.", default=None
        ),
    ) -> list[Path]:
        """Draws, scores and saves. Checks its inputs itself: Cog checks none when it finds no schema file."""
        given = {name: value for name, value in locals().items() if name != "self"}
        async with self.slots.one():
            values = checked(given, self.inputs)
            for sentence in without_effect(values, {one.name: one.arguments.get("default") for one in self.inputs}):
                print(f"warning: {sentence}")
            return await self._answer(values)

    async def _answer(self, values: dict[str, object]) -> list[Path]:
        outputs = ("output_format", "output_quality", "output_metadata", "replicate_weights")
        form, quality, metadata, weights = map(values.pop, outputs)
        check_request(**values)
        stop = threading.Event()
        try:
            async with self.models.borrow(weights, stop.is_set) as model:
                if weights:
                    print(f"model: {model.config.name} from {weights[:100]}: replicate_weights names it")
                for sentence in model.warnings:
                    print(f"warning: {sentence}")
                # In this prediction's context, so that what is logged is part of its logs.
                run, draw = contextvars.copy_context().run, functools.partial(model.generate, should_stop=stop.is_set)
                result = await asyncio.get_running_loop().run_in_executor(
                    self.drawing, functools.partial(run, draw, **values)
                )
            settings = values | {"candidates": result.candidates, "model": model.config.name} if metadata else None
            files = await asyncio.to_thread(self.outputs.save, result, settings, form, quality)
        finally:
            stop.set()  # when cancelled, its thread leaves at the next token, or its download within a second
        scores = [round(score, 4) for score in result.scores]
        print(f"seed: {result.seed}\nscores: {scores}")
        counts = {"image_output_count": len(files), "candidates": result.candidates, "seed": result.seed}
        best = {"best_score": max(scores), "scores": scores, "model": model.config.name}
        for name, value in {**counts, **best, **result.metrics}.items():
            self.record_metric(name, value)
        return [Path(file) for file in files]
