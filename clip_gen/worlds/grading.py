"""The command `evaluate`: a world's judges grade a model; writes a table, a JSON file and a contact sheet.

The first rows are the judges' own accuracy on new renders of the prompts' scenes, and on the VQGAN's reconstructions.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_gen.files import atomic_file, check_claimable, claim_folder, folder_lock, sha256_of, write_text_atomic
from clip_gen.hardware import end_with_parent, spare_cores
from clip_gen.images import to_pil, to_tensor
from clip_gen.metrics.intervals import Share
from clip_gen.networks.mixing import prompt_conditions
from clip_gen.pipeline import ClipGen
from clip_gen.progress_bar import CountLog
from clip_gen.sampling.batch_requests import DRAWN_FROM
from clip_gen.sampling.sampler import Batch, Sampling, candidate_uniforms
from clip_gen.training.losses import decibels, squared_errors
from clip_gen.worlds.graded import Candidate, GradedFile, Verdict, best_of
from clip_gen.worlds.judged import Case, JudgedWorld, load_judged_world
from clip_gen.worlds.world import WORLDS

REPORT, SHEET, GRADED = "report.json", "sheet.png", "graded.jsonl"
CANDIDATES = 16
PROMPTS_PER_BATCH = 8
WORLDS_FOLDER = Path(__file__).parent
SHOWN, COLUMNS = 32, 16  # prompts of each kind on the contact sheet, and in a row of it
FROM_IMAGES = ("one", "two")  # the kinds that are also drawn from the embeddings of renders


@functools.cache
def readers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(spare_cores(), initializer=_start_reader)


def _start_reader() -> None:
    torch.set_num_threads(1)  # after a fork, torch's other threads are gone
    end_with_parent()


class Evaluation:
    """Grades one model with one sampling on fixed prompts and seeds.

    rows: of the first judge, and beside it of the others. limits: for a row of prompts the row of reconstructions that
    limits it. saved: keeps the graded candidates, so that an interrupted evaluation resumes.
    """

    def __init__(
        self,
        world: JudgedWorld,
        model: ClipGen,
        prompts: int,
        seed: int,
        sampling: Sampling,
        saved: GradedFile | None = None,
    ):
        self.saved = saved
        self.world, self.model, self.prompts, self.seed, self.sampling = world, model, prompts, seed, sampling
        self.judged: dict[str, dict[str, Share]] = {judge: {} for judge in world.judges}
        self.limits: dict[str, str] = {}
        self.decibels: dict[str, float] = {}
        self.best: dict[str, list[Candidate]] = {}

    @property
    def rows(self) -> dict[str, Share]:
        """Of the most trusted judge."""
        return self.judged[self.world.judges[0]]

    def run(self, kinds: Sequence[str]) -> None:
        for kind in kinds:
            self._renders_read(kind)
        for kind in kinds:
            self._reconstructions(kind)
        for kind in kinds:
            self.grade(kind, "text")
            if kind in FROM_IMAGES:
                self.grade(kind, "image")

    def cases(self, kind: str) -> list[Case]:
        return self.world.cases(kind, self.prompts, self.seed)

    def grade(self, kind: str, source: str) -> None:
        """Adds rows for one kind of prompt; source: "text", or "image" for the embeddings of matching renders."""
        title = self.world.titles[kind]
        name = title if source == "text" else f"{title}, from image embeddings"
        graded = self._graded(name, self.cases(kind), source)
        limit = f"{title}, reconstructions"
        for number, judge in enumerate(self.world.judges):
            for n in (1, 4, CANDIDATES):
                verdicts = [best_of(candidates[:n]).verdicts[number] for candidates in graded]
                self._row(judge, f"{name}, best of {n}", [verdict.right for verdict in verdicts], limit)
            perfect = [any(candidate.verdicts[number].right for candidate in candidates) for candidates in graded]
            self._row(judge, f"{name}, perfect ranker of {CANDIDATES}", perfect, limit)
            self._attributes(judge, f"{name}, best of {CANDIDATES}", verdicts, limit)
        if source == "text":
            self.best[kind] = [best_of(candidates) for candidates in graded]

    def _graded(self, name: str, chosen: list[Case], source: str) -> list[list[Candidate]]:
        """The candidates of each case, of which some were graded before. Only those on the sheet have a picture."""
        graded = self.saved.rows[name][: len(chosen)] if self.saved else []
        progress = CountLog(name, len(chosen), len(graded))
        for start in range(len(graded), len(chosen), PROMPTS_PER_BATCH):
            some = self.candidates(chosen[start : start + PROMPTS_PER_BATCH], start, source)
            for number, candidates in enumerate(some, start):
                shown = best_of(candidates) if source == "text" and number < SHOWN else None
                graded.append([one if one is shown else replace(one, picture=None) for one in candidates])
            if self.saved:
                self.saved.append(name, graded[-len(some) :])
            progress.advance(len(some))
        return graded

    def _row(self, judge: str, name: str, right: list[bool], limit: str | None = None) -> None:
        self.judged[judge][name] = Share(sum(right), len(right))
        if limit:
            self.limits[name] = limit

    def _attributes(self, judge: str, name: str, verdicts: list[Verdict], limit: str | None = None) -> None:
        for attribute in sorted({attribute for verdict in verdicts for attribute in verdict.grades}):
            stated = [verdict.grades[attribute] for verdict in verdicts if attribute in verdict.grades]
            self._row(judge, f"{name}, {attribute}", stated, limit and f"{limit}, {attribute}")
        clean = "a clean picture"
        self._row(judge, f"{name}, {clean}", [verdict.clean for verdict in verdicts], limit and f"{limit}, {clean}")

    @torch.inference_mode()
    def candidates(self, chosen: list[Case], start: int, source: str) -> list[list[Candidate]]:
        """Samples and grades the candidates of each case; `start` is the number of the first case."""
        model = self.model
        text = model.bridge(model.clip_encoder.encode_text([case.prompt for case in chosen]))
        length = model.config.gpt.block_size
        # A different seed for each prompt, as with different users.
        seeds = range(self.seed + start, self.seed + start + len(chosen))
        numbers = torch.stack([candidate_uniforms(seed, range(CANDIDATES), length + 1) for seed in seeds])
        if source == "image":
            condition = model.clip_encoder.encode_image(self._renders(chosen)).repeat_interleave(CANDIDATES, dim=0)
        else:
            rows = zip(chosen, text.split(1), numbers[:, :, -1], strict=True)
            clip, bridge = model.clip_encoder, model.bridge
            condition = torch.cat([prompt_conditions(clip, bridge, case.prompt, *row) for case, *row in rows])
        uniforms = numbers[:, :, :-1].flatten(0, 1)
        batch = Batch(model.gpt, condition, uniforms, self.sampling, likelihoods=True).run()
        images = torch.cat([model.vqgan.decode(part) for part in batch.tokens.split(CANDIDATES)])
        embeddings = model.clip_encoder.encode_image(images).view(len(chosen), CANDIDATES, -1)
        # As in batch_requests.py; candidates of images are compared with the text alone.
        wanted = text[:, None].expand_as(embeddings)
        if source == "text":
            wanted = wanted.lerp(condition.view_as(embeddings), DRAWN_FROM)
        scores = (embeddings * wanted).sum(dim=2).flatten()
        scores = (scores + model.likelihood_weight * batch.likelihoods.of_sampled).tolist()
        pictures = to_pil(images)
        verdicts = self.verdicts(pictures, [case for case in chosen for _ in range(CANDIDATES)])
        candidates = list(map(Candidate, pictures, scores, verdicts))
        return [candidates[start : start + CANDIDATES] for start in range(0, len(candidates), CANDIDATES)]

    def verdicts(self, pictures: list[Image.Image], chosen: list[Case]) -> list[tuple[Verdict, ...]]:
        """Of all judges on each picture. A picture takes 10 ms, so this uses one process per spare core."""
        world = self.world
        found = readers().map(world.read, map(np.asarray, pictures), chunksize=8)
        return [
            tuple(Verdict(world.grade(reading, case.description), world.is_clean(reading)) for reading in readings)
            for readings, case in zip(found, chosen, strict=True)
        ]

    def _renders(self, chosen: list[Case]) -> Tensor:
        renders = [self.world.render(case.scene, self.model.config.vqgan.resolution) for case in chosen]
        return to_tensor(renders).to(self.model.device)

    def _renders_read(self, kind: str) -> None:
        """Adds rows for new renders: the judges' own accuracy."""
        chosen = self.cases(kind)
        self._rows_of(f"{self.world.titles[kind]}, renders", self._renders(chosen), chosen)

    @torch.inference_mode()
    def _reconstructions(self, kind: str) -> None:
        """Adds rows for new renders, encoded and decoded by the VQGAN: an upper limit for the model."""
        chosen, vqgan, name = self.cases(kind), self.model.vqgan, f"{self.world.titles[kind]}, reconstructions"
        renders = self._renders(chosen)
        images = torch.cat([vqgan.decode(vqgan.encode(part)) for part in renders.split(64)])
        self.decibels[name] = round(float(decibels(squared_errors(images, renders).mean())), 2)
        self._rows_of(name, images, chosen)

    def _rows_of(self, name: str, images: Tensor, chosen: list[Case]) -> None:
        by_judge = zip(*self.verdicts(to_pil(images), chosen), strict=True)
        for judge, verdicts in zip(self.world.judges, by_judge, strict=True):
            self._row(judge, name, [verdict.right for verdict in verdicts])
            self._attributes(judge, name, verdicts)

    def relative(self, judge: str, name: str) -> float | None:
        """A row's share of what the judge says of reconstructions; None for other rows, and where that is 0."""
        limit = self.judged[judge].get(self.limits.get(name))
        return self.judged[judge][name].value / limit.value if limit and limit.right else None

    def table(self) -> str:
        """A line for each row: of each judge the share, and its ratio to what the judge says of reconstructions."""
        width, empty = max(map(len, self.rows)), " " * len(" (100 %)")
        lines = [" " * width + "".join(f"  {judge:<34}" for judge in self.world.judges).rstrip()]
        for name in self.rows:
            line = f"{name:<{width}}"
            for judge, shares in self.judged.items():
                ratio = self.relative(judge, name)
                relative = empty if ratio is None else f" ({100 * ratio:3.0f} %)"
                line += f"  {shares[name]!s:<26}{relative}"
            lines.append(line.rstrip())
        lines += [f"{name}: {value} dB" for name, value in self.decibels.items()]
        return "\n".join([*lines, "In the last brackets: relative to the share of reconstructions that are right."])

    def as_json(self) -> dict[str, object]:
        """The rows are of the first judge."""
        by_judge = {
            judge: {name: self._json_row(judge, name, share) for name, share in shares.items()}
            for judge, shares in self.judged.items()
        }
        settings = {"prompts": self.prompts, "seed": self.seed, "sampling": vars(self.sampling)}
        rows = by_judge.pop(self.world.judges[0])
        return settings | {"decibels": self.decibels, "rows": rows, "other_judges": by_judge}

    def _json_row(self, judge: str, name: str, share: Share) -> dict[str, object]:
        row = vars(share) | {"share": round(share.value, 4), "interval_95": share.interval}
        ratio = self.relative(judge, name)
        return row if ratio is None else row | {"of_reconstructions": round(ratio, 4)}

    def sheet(self) -> Image.Image:
        """The best of 16 for the first prompts of each kind; a red bar under those the judge calls wrong."""
        side, gap = self.model.config.vqgan.resolution, 4
        shown = [candidate for best in self.best.values() for candidate in best[:SHOWN]]
        rows = -(-len(shown) // COLUMNS)
        sheet = Image.new("RGB", (COLUMNS * (side + gap), rows * (side + 2 * gap)), (200, 200, 200))
        for i, candidate in enumerate(shown):
            x, y = i % COLUMNS * (side + gap), i // COLUMNS * (side + 2 * gap)
            sheet.paste(candidate.picture, (x, y))
            if not candidate.right:
                sheet.paste((220, 0, 0), (x, y + side, x + side, y + side + gap))
        return sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a training's folder, a weights tar or its URL")
    words = "what the model draws; default: by the name in its config.yaml"
    parser.add_argument("--world", choices=WORLDS, help=words)
    parser.add_argument("--prompts", type=int, default=500, help="prompts of each kind; default 500")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and the candidates; default 0")
    parser.add_argument("--kinds", nargs="+", help="kinds of prompts, as in the world's prompts.py; default: all")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; default 1: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="as in generate; default 1: all tokens")
    parser.add_argument("--top-k", type=int, default=0, help="as in generate; default 0: all tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="as in generate; default 1")
    words = "a new or empty folder, or that of an evaluation; default runs/evaluation"
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help=words)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if available")


def world_of(model: ClipGen, chosen: str | None) -> JudgedWorld:
    """The chosen world, or that of the model's name; ValueError if it is of none."""
    name = chosen or model.config.name
    if name not in WORLDS:
        names = " or ".join(f"--world {world}" for world in WORLDS)
        raise ValueError(f'the name of the model, "{name}", does not tell what it draws; add {names}')
    return load_judged_world(name)


def main(arguments: argparse.Namespace) -> None:
    sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
    sampling.check()
    if arguments.prompts < 1:
        raise ValueError(f"prompts is {arguments.prompts}; give 1 or more")
    check_claimable(arguments.out, "evaluation")
    model = ClipGen.load(arguments.model, arguments.device)
    world = world_of(model, arguments.world)
    kinds = arguments.kinds or list(world.titles)
    unknown = [kind for kind in kinds if kind not in world.titles]
    if unknown:
        raise ValueError(f'no kind of prompts is called "{unknown[0]}"; choose from {", ".join(world.titles)}')
    claim_folder(arguments.out, "evaluation")
    work = arguments.out / "work"
    readers().submit(int).result()  # now: processes that start later would inherit the lock
    with folder_lock(
        work, f"{arguments.out} is in use by another evaluation; wait for it to end, or name another folder"
    ):
        saved = GradedFile(work / GRADED, drawn_with(model, world, arguments.seed, sampling))
        evaluation = Evaluation(world, model, arguments.prompts, arguments.seed, sampling, saved)
        evaluation.run(kinds)
        print(evaluation.table())
        write_text_atomic(arguments.out / REPORT, json.dumps(evaluation.as_json(), indent=2) + "\n")
        with atomic_file(arguments.out / SHEET) as temporary:
            evaluation.sheet().save(temporary, "png")
        saved.remove()
    print(f"wrote {arguments.out / REPORT} and {arguments.out / SHEET}")


def drawn_with(model: ClipGen, world: JudgedWorld, seed: int, sampling: Sampling) -> dict[str, object]:
    """What graded candidates depend on, with the code and the data of the worlds."""
    paths = sorted(path for path in WORLDS_FOLDER.rglob("*.*") if path.suffix != ".pyc")
    files = {str(path.relative_to(WORLDS_FOLDER)): sha256_of(path) for path in paths}
    numbers = {"device": model.device.type, "dtype": str(model.gpt.cache_dtype), "seed": seed, **asdict(sampling)}
    return {"model": model.sha256, **numbers, "titles": world.titles, "files": files}
