"""The command `optimise`: VQGAN+CLIP beside CLIP-GEN, with the same model and prompts, quality against seconds.

Every prompt's pictures are files, and its seconds and scores lines of a file, so that a killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip_gen.evaluation.optimisation import OptimisationSettings, optimise
from clip_gen.evaluation.time_plot import time_plot
from clip_gen.files import check_claimable, claim_folder, write_text_atomic
from clip_gen.generate import load_model
from clip_gen.images import to_tensor
from clip_gen.metrics.clip_scores import clip_scores
from clip_gen.metrics.distributions import cmmd
from clip_gen.metrics.features import clip_features
from clip_gen.metrics.intervals import Estimate, mean, share
from clip_gen.pipeline import ClipGen
from clip_gen.validation import MAX_CANDIDATES, check_number
from clip_gen.worlds.grading import world_of
from clip_gen.worlds.judged import Case, JudgedWorld
from clip_gen.worlds.world import WORLDS

log = logging.getLogger(__name__)

KIND = "optimisation"
RECORDS, RESULTS = "measured.jsonl", "results.json"
TIMED = 3  # prompts on which fewer candidates than the most are timed
REAL = 500  # renders that CMMD compares with
REAL_SEED = 1_000_003  # of other renders than the prompts'
METHODS = {"candidates": "CLIP-GEN, best of so many", "steps": "VQGAN+CLIP, so many steps"}
ROWS = {"candidates": "CLIP-GEN, best of {}", "steps": "VQGAN+CLIP, {} steps"}
FLAGS = {
    "rate": "learning rate; default 0.1",
    "cutouts": "cut-outs of each step; default 32",
    "smallest": "least side of a cut-out, as a share of the picture's; default 0.5",
    "degrees": "the most that cut-outs are turned by; default 30",
    "flip": "mirror half of the cut-outs; default: on",
    "noise": "the most noise on cut-outs; default 0.1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a training's folder, a weights tar or its URL")
    parser.add_argument("--world", choices=WORLDS, help="what the model draws; default: by the name in its config.yaml")
    parser.add_argument("--kinds", nargs="+", default=["one", "two"], help="kinds of prompts; default: one two")
    parser.add_argument("--prompts", type=int, default=50, help="prompts of each kind; default 50")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100, 300], help="default: 10 30 100 300")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 16, 64], help="default: 1 4 16 64")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the pictures; default 0")
    for field in fields(OptimisationSettings):
        is_switch = isinstance(field.default, bool)
        how = {"action": argparse.BooleanOptionalAction} if is_switch else {"type": type(field.default)}
        parser.add_argument(f"--{field.name}", default=field.default, help=FLAGS[field.name], **how)
    words = "a new or empty folder, or that of an earlier run, which is resumed; default runs/optimisation"
    parser.add_argument("--out", type=Path, default=Path("runs/optimisation"), help=words)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if available")


def main(arguments: argparse.Namespace) -> None:
    for name, most in (("candidates", MAX_CANDIDATES), ("steps", 10**6)):
        for value in getattr(arguments, name):
            check_number(name, value, 1, most, whole=True)
    for name, least, most in (("prompts", 1, 10**6), ("cutouts", 1, 1024), ("smallest", 0.01, 1), ("rate", 0, 10)):
        check_number(name, getattr(arguments, name), least, most)
    check_claimable(arguments.out, KIND)
    model = load_model(arguments)
    world = world_of(model, arguments.world)
    unknown = [kind for kind in arguments.kinds if kind not in world.titles]
    if unknown:
        raise ValueError(f'no kind of prompts is called "{unknown[0]}"; choose from {", ".join(world.titles)}')
    claim_folder(arguments.out, KIND)
    settings = OptimisationSettings(
        **{field.name: getattr(arguments, field.name) for field in fields(OptimisationSettings)}
    )
    run = Comparison(model, world, settings, arguments)
    run.draw()
    points = run.points()
    write_text_atomic(arguments.out / RESULTS, json.dumps(run.as_json(points), indent=1) + "\n")
    for plot in run.plots(points):
        write_text_atomic(arguments.out / f"{plot['name']}.svg", time_plot(plot))
    print(table(points))
    print(f"CLIP score and CMMD: {run.network.name}, which both methods use")
    print(f"wrote {arguments.out / RESULTS} and its plots")


@dataclass(frozen=True)
class Point:
    """One method with one budget. accuracy: the share of prompts of which the judge calls everything right."""

    method: str
    budget: int  # candidates or steps
    seconds: float  # a picture, the median
    prompts: int
    accuracy: Estimate
    clip_score: Estimate
    cmmd: Estimate


class Comparison:
    """Draws the pictures of all prompts with both methods, and measures them."""

    def __init__(
        self, model: ClipGen, world: JudgedWorld, settings: OptimisationSettings, arguments: argparse.Namespace
    ):
        self.model, self.world, self.settings, self.arguments = model, world, settings, arguments
        self.out, self.network = arguments.out, clip_features(model.clip_encoder, model.config.name)
        kinds = [(kind, world.cases(kind, arguments.prompts, arguments.seed)) for kind in arguments.kinds]
        self.cases: dict[str, Case] = {f"{kind}-{i:04}": case for kind, some in kinds for i, case in enumerate(some)}
        self.budgets = [("candidates", n) for n in sorted(arguments.candidates)]
        self.budgets += [("steps", n) for n in sorted(arguments.steps)]

    def draw(self) -> None:
        """Draws what earlier runs with the same settings have not drawn."""
        began, drawn = time.monotonic(), self._records()
        done = {record["name"] for record in drawn}
        # Without a line that was cut off, and those of other settings, whose pictures will be replaced.
        write_text_atomic(self.out / RECORDS, "".join(json.dumps(record) + "\n" for record in drawn))
        waiting = [(number, name) for number, name in enumerate(self.cases) if name not in done]
        for count, (number, name) in enumerate(waiting, 1):
            record = {"name": name, "settings": self._key(), "points": self._drawn(number, name)}
            with (self.out / RECORDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            left = (time.monotonic() - began) / count * (len(waiting) - count) / 60
            log.info("%s: %d of %d prompts, %.1f min left", name, count, len(waiting), left)

    def _records(self) -> list[dict]:
        """Of prompts that are drawn with these settings."""
        path, found = self.out / RECORDS, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:  # the process was killed while it wrote this line
                continue
        return [record for record in found if record["settings"] == self._key() and record["name"] in self.cases]

    def _key(self) -> dict[str, object]:
        budgets = {name: sorted(getattr(self.arguments, name)) for name in METHODS}
        return {"model_sha256": self.model.sha256, "seed": self.arguments.seed, **budgets, **asdict(self.settings)}

    def _drawn(self, number: int, name: str) -> list[dict[str, object]]:
        """The points of one prompt; saves its pictures."""
        prompt, seed = self.cases[name].prompt, self.arguments.seed + number
        points = self._candidates(prompt, seed, is_timed=number < TIMED)
        for snapshot in optimise(self.model, prompt, sorted(self.arguments.steps), seed, self.settings):
            points.append(("steps", snapshot.steps, snapshot.seconds, snapshot.score, snapshot.picture))
        for method, budget, _, _, picture in points:
            path = self._picture(name, method, budget)
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        names = ("method", "budget", "seconds", "score")
        return [dict(zip(names, point[:4], strict=True)) for point in points]

    def _candidates(
        self, prompt: str, seed: int, is_timed: bool
    ) -> list[tuple[str, int, float | None, float, Image.Image]]:
        """The best of each number of candidates: the first n of N candidates are those of a run with n."""
        most = max(self.arguments.candidates)
        seconds = {n: self._seconds(prompt, n, seed) for n in self.arguments.candidates if is_timed and n < most}
        began = self._clock()
        drawn = self.model.generate(prompt, candidates=most, num_outputs=most, seed=seed, clip_rerank=False)
        seconds[most] = self._clock() - began
        found = []
        for n in sorted(self.arguments.candidates):
            best = drawn.images[int(np.argmax(drawn.scores[:n]))]
            found.append(("candidates", n, seconds.get(n), self._clip_score(best, prompt), best))
        return found

    def _clip_score(self, picture: Image.Image, prompt: str) -> float:
        """Of the cosine alone: the ranking of a model with a memory or a likelihood_weight knows more than it."""
        embedding = self.model.clip_encoder.encode_image(to_tensor([picture]).to(self.model.device))
        return float(clip_scores(embedding, self.model.embed_prompt(prompt)))

    def _seconds(self, prompt: str, candidates: int, seed: int) -> float:
        began = self._clock()
        self.model.generate(prompt, candidates=candidates, num_outputs=1, seed=seed)
        return self._clock() - began

    def _clock(self) -> float:
        """As in optimise()."""
        return time.perf_counter() if self.model.device.type == "cuda" else time.process_time()

    def _picture(self, name: str, method: str, budget: int) -> Path:
        return self.out / "pictures" / f"{name}.{method}-{budget}.png"

    def points(self) -> list[Point]:
        records, world = {record["name"]: record["points"] for record in self._records()}, self.world
        resolution, scenes = self.model.config.vqgan.resolution, []
        for kind in self.arguments.kinds:
            scenes += [case.scene for case in world.cases(kind, -(-REAL // len(self.arguments.kinds)), REAL_SEED)]
        network, device = self.network, self.model.device
        real = network(to_tensor([world.render(scene, resolution)]).to(device) for scene in scenes)
        found = []
        for method, budget in self.budgets:
            pictures = [Image.open(self._picture(name, method, budget)) for name in self.cases]
            right = torch.tensor([self._is_right(*pair) for pair in zip(pictures, self.cases.values(), strict=True)])
            measured = [
                point
                for name in self.cases
                for point in records[name]
                if (point["method"], point["budget"]) == (method, budget)
            ]
            drawn = network(to_tensor([picture]).to(device) for picture in pictures)
            seconds = statistics.median(point["seconds"] for point in measured if point["seconds"] is not None)
            scores = mean(torch.tensor([point["score"] for point in measured]))
            found.append(Point(method, budget, seconds, len(pictures), share(right), scores, cmmd(real, drawn)[0]))
        return found

    def _is_right(self, picture: Image.Image, case: Case) -> bool:
        """By the most trusted judge."""
        return all(self.world.grade(self.world.read(np.asarray(picture))[0], case.description).values())

    def plots(self, points: Sequence[Point]) -> list[dict[str, object]]:
        """For time_plot, one for each measure."""
        count = f"{points[0].prompts} prompts"
        measures = {
            "accuracy": f"Pictures that the judge calls right, in %, of {count}",
            "clip_score": f"CLIP score, of the CLIP that both methods use, {count}",
            "cmmd": f"CMMD of drawn pictures and renders, of the same CLIP, {count}; lower is better",
        }
        return [
            {"name": name, "title": title, "series": [_series(points, method, name) for method in METHODS]}
            for name, title in measures.items()
        ]

    def as_json(self, points: Sequence[Point]) -> dict[str, object]:
        about = {"model": self.model.config.name, "device": self.model.device.type, "threads": torch.get_num_threads()}
        return {**about, **self._key(), "points": [_as_json(point) for point in points], "plots": self.plots(points)}


def _as_json(point: Point) -> dict[str, object]:
    """JSON has no NaN."""
    return {
        name: {end: _finite(number) for end, number in value.items()} if isinstance(value, dict) else value
        for name, value in asdict(point).items()
    }


def _series(points: Sequence[Point], method: str, measure: str) -> dict[str, object]:
    unit = 100 if measure == "accuracy" else 1
    chosen = [(point, getattr(point, measure)) for point in points if point.method == method]
    return {
        "name": METHODS[method],
        "points": [
            {
                "seconds": point.seconds,
                "label": str(point.budget),
                **{name: _finite(unit * value) for name, value in asdict(estimate).items()},
            }
            for point, estimate in chosen
        ],
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def table(points: Sequence[Point]) -> str:
    lines = [f"{'':<32}{'seconds':>9}  {'judge':<24}{'CLIP score':<24}CMMD"]
    for point in points:
        name = ROWS[point.method].format(point.budget)
        shown = [_shown(point.accuracy, 100, " %"), _shown(point.clip_score), _shown(point.cmmd)]
        lines.append(f"{name:<32}{point.seconds:>9.2f}  {shown[0]:<24}{shown[1]:<24}{shown[2]}")
    return "\n".join(lines)


def _shown(estimate: Estimate, unit: float = 1, sign: str = "") -> str:
    value, low, high = (unit * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f}{sign} ({low:.1f} to {high:.1f})" if np.isfinite(low) else f"{value:.1f}{sign}"
