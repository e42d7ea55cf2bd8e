"""The models that the page offers, those that are loaded, and examples of what a model knows."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from clip_gen.files import ROOT, checkpoints_folder
from clip_gen.pipeline import ClipGen
from clip_gen.sampling.condition import Condition
from clip_gen.sampling.sampler import Sampling
from clip_gen.weights.default_model import find_weights
from clip_gen.weights.model_folder import CONFIG, load_record

MAX_LOADED = 2
MAX_EXAMPLES = 6
BUNDLED = ("shapes", "emoji")
PROMPTS = (
    "a train on a bridge",
    "people skiing down a snowy slope",
    "a red double decker bus in a city street",
    "a cat sleeping on a sofa",
    "a snowy mountain under a blue sky",
    "a slice of pizza",
    "two cats",
    "a blue dog on a white background",
    "an apple beside a banana",
    "a house left of a tree",
    "a smiling face with sunglasses",
    "a rocket above a star",
    "a green frog",
    "a large red circle on a white background",
    "a small blue star on a black background",
    "a yellow triangle above a purple square",
    "a pink heart left of a green cross on a gray background",
    "a cyan ring:2 | a white background:0.5",
    "an orange diamond",
)


def model_choices() -> list[tuple[str, str]]:
    """Label and name of each model: bundled and pulled ones in checkpoints/, and trainings in the project's folder and
    the current one.
    """
    found = {}
    for config in sorted(checkpoints_folder().glob(f"*/{CONFIG}")):
        folder = config.parent
        if all((folder / f"{part}.safetensors").is_file() for part in ("clip", "vqgan", "gpt")):
            origin = "pulled" if "imported" in load_record(folder) else "trained"
            kind = "bundled" if folder.name in BUNDLED else origin
            found[f"checkpoints/{folder.name}"] = f"{folder.name} ({kind})"
    for config in sorted(path for parent in {ROOT, Path.cwd()} for path in parent.glob(f"*/model/{CONFIG}")):
        found[os.path.relpath(config.parent.parent)] = f"{config.parent.parent.name} (trained)"
    return [(label, name) for name, label in found.items()]


def examples(model: ClipGen) -> list[str]:
    """Prompts of which the model knows all words, at most MAX_EXAMPLES."""
    known = [prompt for prompt in PROMPTS if not model.warnings_about(Condition(prompt), Sampling())]
    return known[:MAX_EXAMPLES]


class Models:
    """The models that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: OrderedDict[tuple[str, int], ClipGen] = OrderedDict()

    def get(self, name: str) -> ClipGen:
        """The model of a name, a path or a URL. ModelFolderError if it cannot be used."""
        weights = find_weights(name)
        with self._lock:
            key = (weights, _changed(Path(weights)))
            if key not in self._loaded:
                self._loaded[key] = ClipGen.load(weights)
            self._loaded.move_to_end(key)
            while len(self._loaded) > MAX_LOADED:
                self._loaded.popitem(last=False)
            return self._loaded[key]


def _changed(path: Path) -> int:
    """When a model folder, a training's folder or a file changed last, so that a model that was trained again is loaded
    again.
    """
    files = [path, *path.glob("*"), *path.glob("model/*")] if path.exists() else []
    return max((file.stat().st_mtime_ns for file in files), default=0)
