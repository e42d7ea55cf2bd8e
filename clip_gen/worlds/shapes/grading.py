"""The command `evaluate`: the judge grades a shapes model; writes a table, a JSON file and a contact sheet."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
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
class Graded:
    """The candidates of one prompt."""

    scores: Tensor  # CLIP scores
    grades: list[dict[str, bool]]  # by the judge, for each attribute that the prompt states
    clean: list[bool]  # whether the judge can read the picture at all
    pictures: list[Image.Image]

    @property
    def right(self) -> list[bool]:
        return [all(grades.values()) for grades in self.grades]

    def best(self, n: int) -> int:
        """The index of the highest CLIP score among the first n."""
        return int(self.scores[:n].argmax())


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
        self.best: dict[str, list[tuple[Image.Image, bool]]] = {}

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
        graded = [
            row
            for start in range(0, len(chosen), PROMPTS_PER_BATCH)
            for row in self.candidates(chosen[start : start + PROMPTS_PER_BATCH], start, source)
        ]
        name = TITLES[kind] if source == "text" else f"{TITLES[kind]}, from image embeddings"
        for n in (1, 4, CANDIDATES):
            self._row(f"{name}, best of {n}", [row.right[row.best(n)] for row in graded])
        self._row(f"{name}, perfect ranker of {CANDIDATES}", [any(row.right) for row in graded])
        best = [row.grades[row.best(CANDIDATES)] for row in graded]
        for attribute in sorted({name for grades in best for name in grades}):
            stated = [grades[attribute] for grades in best if attribute in grades]
            self._row(f"{name}, best of {CANDIDATES}, {attribute}", stated)
        self._row(f"{name}, best of {CANDIDATES}, a clean picture", [row.clean[row.best(CANDIDATES)] for row in graded])
        if source == "text":
            tops = [(row, row.best(CANDIDATES)) for row in graded]
            self.best[kind] = [(row.pictures[top], row.right[top]) for row, top in tops]
        log.info("%s: %d prompts in %.0f s", name, len(chosen), time.perf_counter() - began)

    def _row(self, name: str, right: list[bool]) -> None:
        self.rows[name] = Share(sum(right), len(right))

    @torch.inference_mode()
    def candidates(self, chosen: list[Case], start: int, source: str) -> list[Graded]:
        """Samples and grades the candidates of some cases; `start` is the number of the first one."""
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
        similarity = model.clip_encoder.encode_image(images).view(len(chosen), CANDIDATES, -1) @ text[:, :, None]
        pictures = to_pil(images)
        readings, rows = readings_of(pictures), []
        for i, case in enumerate(chosen):
            own = slice(i * CANDIDATES, (i + 1) * CANDIDATES)
            grades = [grade(reading, case.description) for reading in readings[own]]
            clean = [reading is not None for reading in readings[own]]
            rows.append(Graded(similarity[i, :, 0].cpu(), grades, clean, pictures[own]))
        return rows

    def _renders(self, chosen: list[Case]) -> Tensor:
        renders = [render(case.scene, self.model.config.vqgan.resolution) for case in chosen]
        return to_tensor(renders).to(self.model.device)

    @torch.inference_mode()
    def _reconstructions(self, kind: str) -> None:
        """Adds a row for new renders, encoded and decoded by the VQGAN: an upper limit for the model."""
        chosen, vqgan = cases(kind, self.prompts, self.seed), self.model.vqgan
        images = torch.cat([vqgan.decode(vqgan.encode(part)) for part in self._renders(chosen).split(64)])
        pairs = zip(readings_of(to_pil(images)), chosen, strict=True)
        right = [satisfies(reading, case.description) for reading, case in pairs]
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
        shown = [row for best in self.best.values() for row in best[: 2 * columns]]
        rows = -(-len(shown) // columns)
        sheet = Image.new("RGB", (columns * (side + gap), rows * (side + 2 * gap)), (200, 200, 200))
        for i, (picture, right) in enumerate(shown):
            x, y = i % columns * (side + gap), i // columns * (side + 2 * gap)
            sheet.paste(picture, (x, y))
            if not right:
                sheet.paste((220, 0, 0), (x, y + side, x + side, y + side + gap))
        return sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a training's folder, a weights tar or its URL")
    parser.add_argument("--prompts", type=int, default=500, help="prompts of each kind; default 500")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the candidates; default 0")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of prompts; default: all")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    words = "a new or empty folder, or that of an evaluation"
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help=words)
    parser.add_argument("--device", default="auto")


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
