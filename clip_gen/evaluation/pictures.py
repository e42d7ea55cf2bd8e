"""An evaluation on pictures: `python -m clip_gen evaluate MODEL --images photos.zip --prompts prompts.txt`.

Its folder keeps the unpacked pictures and the drawn ones, so that the same command resumes. With several processes, of
torchrun, all of them draw, and the first one measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch

from clip_gen.data.archive import check_outside, fingerprint, unpack
from clip_gen.data.manifest import INDEX, unpacked
from clip_gen.evaluation.drawing import draw, picture_lines, prompt_lines
from clip_gen.evaluation.figures import FROM_PICTURES, FROM_PROMPTS, read_report
from clip_gen.evaluation.measuring import Drawn, Measuring
from clip_gen.evaluation.report import write_reports
from clip_gen.evaluation.time_plot import read_points
from clip_gen.files import check_claimable, claim_folder, folder_lock, write_text_atomic
from clip_gen.generate import load_model
from clip_gen.hardware import own_share
from clip_gen.metrics.features import choose_features, load_clip, weights_sha256
from clip_gen.networks.lpips import FrozenLPIPS
from clip_gen.pipeline import ClipGen
from clip_gen.prompts import parse_prompt
from clip_gen.prompts_file import Line
from clip_gen.sampling.sampler import Sampling
from clip_gen.training.processes import wait_for
from clip_gen.validation import MAX_CANDIDATES, MAX_SEED, check_number
from clip_gen.weights.default_model import lpips_weights
from clip_gen.weights.model_folder import load_part

KIND = "evaluation"
MIN_LPIPS_SIDE = 16  # pixels


def run(arguments: argparse.Namespace) -> None:
    """The command. ValueError for what cannot be used."""
    share = own_share()
    settings = drawing_settings(arguments)
    lines = prompt_lines(Path(arguments.prompts), settings) if arguments.prompts else []
    if not lines and not arguments.count:
        raise ValueError("count is 0, and there are no prompts: nothing would be measured; give --prompts or --count")
    other = read_report(arguments.compare) if arguments.compare else None
    baseline = read_points(arguments.baseline) if arguments.baseline else []
    check_outside(arguments.images, arguments.out)
    if share[0] == 0:
        check_claimable(arguments.out, KIND)
    model = load_model(arguments)
    clip, clip_name = (load_clip(arguments.clip), arguments.clip.name) if arguments.clip else (None, model.config.name)
    clip = model.clip_encoder if clip is None else clip.to(model.device)
    network = choose_features(arguments.features, clip, clip_name, model.device)
    if share[0] == 0:
        claim_folder(arguments.out, KIND)
    work = arguments.out / "work"
    busy = f"{arguments.out} is in use by another evaluation; wait for it to end, or name another folder"
    with folder_lock(work, busy) if share[0] == 0 else nullcontext():
        images = unpacked_once(arguments.images, work / "pictures", share)
        training = unpacked_once(arguments.training, work / "training", share) if arguments.training else images
        measuring = Measuring(network, clip, clip_name, model.device)
        evaluation = Evaluation(model, measuring, images, training, settings, arguments.out)
        evaluation.draw(lines, arguments.count, share)
        if share[0] == 0:
            evaluation.measure(arguments.blur)
            print(write_reports(evaluation, arguments, other, baseline))


def drawing_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The settings of ClipGen.generate; ValueError for one that is out of range."""
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
    sampling.check()
    for name, least, most in (("candidates", 1, MAX_CANDIDATES), ("count", 0, 10**6), ("seed", 0, MAX_SEED - 10**6)):
        check_number(name, getattr(arguments, name), least, most, whole=True)
    return vars(sampling) | {"candidates": arguments.candidates, "seed": arguments.seed}


def unpacked_once(source: Path, folder: Path, share: tuple[int, int]) -> list[Path]:
    """The usable pictures of a zip, tar or folder; the first process unpacks them, unless that was done before."""
    note = source_note(folder)
    if share[0]:
        wait_for(folder / INDEX)
    elif not folder.is_dir():
        write_text_atomic(note, fingerprint(source))
        unpack(source, folder)
    elif note.read_text() != fingerprint(source):
        raise ValueError(
            f"{folder.parent.parent} holds an evaluation on other pictures than {source}; name another folder: --out"
        )
    return unpacked(folder).paths


def source_note(folder: Path) -> Path:
    """The file beside a folder of unpacked pictures with the fingerprint of where they are from."""
    return folder.with_name(f"{folder.name}.source")


def bias_of(candidates: int) -> str:
    """What to say beside CLIP scores of the model's own CLIP."""
    took_part = f"chose the best of {candidates}" if candidates > 1 else "conditioned the pictures"
    return f"biased: this CLIP also {took_part}"


def as_text(prompt: str) -> str:
    """A prompt as a CLIP reads it: without weights and backslashes."""
    return " ".join(part.text for part in parse_prompt(prompt))


class Evaluation:
    """Draws and measures pictures of one model. images: real ones; training: those that samples may be copies of."""

    def __init__(
        self,
        model: ClipGen,
        measuring: Measuring,
        images: Sequence[Path],
        training: Sequence[Path],
        settings: dict[str, object],
        out: Path,
    ):
        self.model, self.measuring, self.images, self.training = model, measuring, images, training
        self.settings, self.out = settings, out
        self.resolution = model.config.vqgan.resolution
        folders = {"images": "pictures", "training": "pictures" if training is images else "training"}
        self.fingerprints = {name: source_note(out / "work" / folder).read_text() for name, folder in folders.items()}
        self.prompts: list[str] = []
        self.candidates: dict[str, int] = {}  # the most of a line
        self.paths: dict[str, list[Path]] = {}
        self.drawn: dict[str, Drawn] = {}

    def draw(self, lines: Sequence[Line], count: int, share: tuple[int, int]) -> None:
        """Draws from the prompts' lines, and from the embeddings of `count` random pictures."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        self.numbers = order[:count].sort().values  # archives and folders are often sorted by what pictures show
        self.sources = [self.images[i] for i in self.numbers.tolist()]
        self.prompts = [as_text(line.settings["prompt"]) for line in lines]
        from_pictures = picture_lines(self.images, self.numbers.tolist(), self.settings)
        for source, some in {FROM_PROMPTS: lines, FROM_PICTURES: from_pictures}.items():
            if some:
                self.candidates[source] = max(line.settings["candidates"] for line in some)
                folder = self.out / source.replace(" ", "-")
                self.paths[source] = draw(self.model, some, folder, source, share)

    def measure(self, blurs: Sequence[int]) -> None:
        measuring, model = self.measuring, self.model
        is_own_clip = measuring.clip_weights == weights_sha256(model.clip_encoder)
        real = measuring.of_files(self.images, self.resolution)
        training = real if self.training is self.images else measuring.of_files(self.training, self.resolution)
        self.psnr = torch.empty(0)
        if self.sources:
            self.psnr = measuring.reconstructions(model.vqgan, self.sources, self.resolution, real, self._lpips())
        for source, paths in self.paths.items():
            drawn = Drawn(paths, measuring.of_files(paths, self.resolution))
            self.drawn[source] = drawn
            bias = bias_of(self.candidates[source]) if is_own_clip else ""
            left_out = self.numbers if source == FROM_PICTURES and training is real else None
            measuring.drawn(source, drawn, real, training, left_out)
            if source == FROM_PROMPTS:
                texts = measuring.clip.encode_text(self.prompts).cpu()
                measuring.prompts(source, drawn, self.prompts, texts, bias)
                for radius in blurs:
                    measuring.blurred(source, radius, self.images, paths, self.resolution)
            else:
                measuring.pictures(source, drawn, real.embeddings[self.numbers], bias)

    def _lpips(self) -> FrozenLPIPS | None:
        """LPIPS if it was pulled."""
        weights = lpips_weights()
        if not weights.is_file() or self.resolution < MIN_LPIPS_SIDE:
            return None
        lpips = FrozenLPIPS()
        load_part(lpips, weights)
        return lpips.to(self.model.device)
