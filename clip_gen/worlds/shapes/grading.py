"""The command `evaluate`: the judge grades a shapes model; writes a table, a JSON file and a contact sheet."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_gen.evaluation.metrics import Share
from clip_gen.files import atomic_file, check_claimable, claim_folder, write_text_atomic
from clip_gen.hardware import spare_cores
from clip_gen.images import to_pil, to_tensor
from clip_gen.pipeline import ClipGen
from clip_gen.sampling.sampler import Sampling, candidate_uniforms, sample_tokens
from clip_gen.worlds.shapes.judge import Reading, grade, read, satisfies
from clip_gen.worlds.shapes.prompts import KINDS, Case, cases
from clip_gen.worlds.shapes.rendering import render

log = logging.getLogger(__name__)

REPORT, SHEET = "report.json", "sheet.png"
CANDIDATES = 16
PROMPTS_PER_BATCH = 8

TITLES = {
    "one": "one object",
    "two": "two objects with a relation",
    "held_out": "one object of a held-out pair",
    "unsaid": "attributes left unsaid",
}


@dataclass(frozen=True)
class Candidate:
    """One of the pictures of a prompt."""

    picture: Image.Image
    score: float  # CLIP score
    grades: dict[str, bool]  # by the judge, for each attribute that the prompt states
    clean: bool  # whether the judge can read the picture at all

    @property
    def right(self) -> bool:
        return all(self.grades.values())


def best_of(candidates: list[Candidate]) -> Candidate:
    return max(candidates, key=attrgetter("score"))


@functools.cache
def readers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(spare_cores())


def readings_of(pictures: list[Image.Image]) -> list[Reading | None]:
    """The judge's readings. A picture takes 10 ms, so this uses one process per spare core."""
    return list(readers().map(read, map(np.asarray, pictures), chunksize=8))


class Evaluation:
    """Grades one model with one sampling on fixed prompts and seeds."""

    def __init__(self, model: ClipGen, prompts: int, seed: int, sampling: Sampling):
        self.model, self.prompts, self.seed, self.sampling = model, prompts, seed, sampling
        self.rows: dict[str, Share] = {}
        self.best: dict[str, list[Candidate]] = {}

    def run(self, kinds: list[str]) -> None:
        for kind in kinds:
            self.grade(kind, "text")
            if kind in ("one", "two"):
                self.grade(kind, "image")
            if kind != "unsaid":  # its scenes are like those of the other kinds
                self._reconstructions(kind)

    def grade(self, kind: str, source: str) -> None:
        """Adds rows for one kind of prompt; source: "text", or "image" for the embeddings of matching renders."""
        began, chosen = time.perf_counter(), cases(kind, self.prompts, self.seed)
        graded: list[list[Candidate]] = []
        for start in range(0, len(chosen), PROMPTS_PER_BATCH):
            graded += self.candidates(chosen[start : start + PROMPTS_PER_BATCH], start, source)
        name = TITLES[kind] if source == "text" else f"{TITLES[kind]}, from image embeddings"
        for n in (1, 4, CANDIDATES):
            self._row(f"{name}, best of {n}", [best_of(candidates[:n]).right for candidates in graded])
        perfect = [any(candidate.right for candidate in candidates) for candidates in graded]
        self._row(f"{name}, perfect ranker of {CANDIDATES}", perfect)
        best = [best_of(candidates) for candidates in graded]
        for attribute in sorted({attribute for candidate in best for attribute in candidate.grades}):
            stated = [candidate.grades[attribute] for candidate in best if attribute in candidate.grades]
            self._row(f"{name}, best of {CANDIDATES}, {attribute}", stated)
        self._row(f"{name}, best of {CANDIDATES}, a clean picture", [candidate.clean for candidate in best])
        if source == "text":
            self.best[kind] = best
        log.info("%s: %d prompts in %.0f s", name, len(chosen), time.perf_counter() - began)

    def _row(self, name: str, right: list[bool]) -> None:
        self.rows[name] = Share(sum(right), len(right))

    @torch.inference_mode()
    def candidates(self, chosen: list[Case], start: int, source: str) -> list[list[Candidate]]:
        """Samples and grades the candidates of each case; `start` is the number of the first case."""
        model = self.model
        condition = text = model.bridge(model.clip_encoder.encode_text([case.prompt for case in chosen]))
        if source == "image":
            condition = model.clip_encoder.encode_image(self._renders(chosen))
        length = model.config.gpt.block_size
        # A different seed for each prompt, as with different users.
        uniforms = [candidate_uniforms(self.seed + start + i, range(CANDIDATES), length) for i in range(len(chosen))]
        condition = condition.repeat_interleave(CANDIDATES, dim=0)
        tokens = sample_tokens(model.gpt, condition, torch.cat(uniforms), self.sampling)
        images = torch.cat([model.vqgan.decode(part) for part in tokens.split(CANDIDATES)])
        embeddings = model.clip_encoder.encode_image(images).view(len(chosen), CANDIDATES, -1)
        scores = (embeddings @ text[:, :, None]).flatten().tolist()
        pictures = to_pil(images)
        prompts = [case.description for case in chosen for _ in range(CANDIDATES)]
        candidates = [
            Candidate(picture, score, grade(reading, prompt), clean=reading is not None)
            for picture, score, reading, prompt in zip(pictures, scores, readings_of(pictures), prompts, strict=True)
        ]
        return [candidates[start : start + CANDIDATES] for start in range(0, len(candidates), CANDIDATES)]

    def _renders(self, chosen: list[Case]) -> Tensor:
        renders = [render(case.scene, self.model.config.vqgan.resolution) for case in chosen]
        return to_tensor(renders).to(self.model.device)

    @torch.inference_mode()
    def _reconstructions(self, kind: str) -> None:
        """Adds a row for new renders, encoded and decoded by the VQGAN: an upper limit for the model."""
        chosen, vqgan = cases(kind, self.prompts, self.seed), self.model.vqgan
        images = torch.cat([vqgan.decode(vqgan.encode(part)) for part in self._renders(chosen).split(64)])
        readings = readings_of(to_pil(images))
        right = [satisfies(reading, case.description) for reading, case in zip(readings, chosen, strict=True)]
        self._row(f"{TITLES[kind]}, reconstructions", right)

    def table(self) -> str:
        width = max(map(len, self.rows))
        return "\n".join(f"{name:<{width}}  {share}" for name, share in self.rows.items())

    def as_json(self) -> dict[str, object]:
        rows = {
            name: vars(share) | {"share": round(share.value, 4), "interval_95": share.interval}
            for name, share in self.rows.items()
        }
        return {"prompts": self.prompts, "seed": self.seed, "sampling": vars(self.sampling), "rows": rows}

    def sheet(self) -> Image.Image:
        """The best of 16 for the first prompts of each kind; a red bar under those the judge calls wrong."""
        side, columns, gap = self.model.config.vqgan.resolution, 16, 4
        shown = [candidate for best in self.best.values() for candidate in best[: 2 * columns]]
        rows = -(-len(shown) // columns)
        sheet = Image.new("RGB", (columns * (side + gap), rows * (side + 2 * gap)), (200, 200, 200))
        for i, candidate in enumerate(shown):
            x, y = i % columns * (side + gap), i // columns * (side + 2 * gap)
            sheet.paste(candidate.picture, (x, y))
            if not candidate.right:
                sheet.paste((220, 0, 0), (x, y + side, x + side, y + side + gap))
        return sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a training's folder, a weights tar or its URL")
    parser.add_argument("--prompts", type=int, default=500, help="prompts of each kind; default 500")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and the candidates; default 0")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of prompts; default: all")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; default 1: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="as in generate; default 1: all tokens")
    parser.add_argument("--top-k", type=int, default=0, help="as in generate; default 0: all tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="as in generate; default 1")
    words = "a new or empty folder, or that of an evaluation; default runs/evaluation"
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help=words)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if available")


def main(arguments: argparse.Namespace) -> None:
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
    sampling.check()
    if arguments.prompts < 1:
        raise ValueError(f"prompts is {arguments.prompts}; give 1 or more")
    check_claimable(arguments.out, "evaluation")
    model = ClipGen.load(arguments.model, arguments.device)
    evaluation = Evaluation(model, arguments.prompts, arguments.seed, sampling)
    evaluation.run(arguments.kinds)
    print(evaluation.table())
    claim_folder(arguments.out, "evaluation")
    write_text_atomic(arguments.out / REPORT, json.dumps(evaluation.as_json(), indent=2) + "\n")
    with atomic_file(arguments.out / SHEET) as temporary:
        evaluation.sheet().save(temporary, "png")
    print(f"wrote {arguments.out / REPORT} and {arguments.out / SHEET}")
