"""Graded candidates, and the file that keeps them during an evaluation, so that an interrupted one resumes."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

from PIL import Image

from clip_gen.files import write_text_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a picture."""

    grades: dict[str, bool]  # for each attribute that the prompt states
    clean: bool  # whether the judge can read all of the picture

    @property
    def right(self) -> bool:
        return all(self.grades.values())


@dataclass(frozen=True)
class Candidate:
    """One of the pictures of a prompt. verdicts: of each judge, the most trusted first."""

    picture: Image.Image | None  # None if it is not shown
    score: float  # CLIP score
    verdicts: tuple[Verdict, ...]

    @property
    def right(self) -> bool:
        return self.verdicts[0].right


def best_of(candidates: list[Candidate]) -> Candidate:
    return max(candidates, key=attrgetter("score"))


class GradedFile:
    """The graded candidates of each row of an evaluation in the order of its prompts, a line of JSON for each prompt.

    about: what the candidates depend on. A file about something else is dropped, and so are the lines from the first
    damaged one on, such as one that was cut short.
    """

    def __init__(self, path: Path, about: Mapping[str, object]):
        self.path, self.rows = path, defaultdict(list)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        wanted, kept = json.dumps(about), []
        first, *lines = text.split("\n")[:-1] or [wanted]
        if first != wanted:
            log.info("%s is of another evaluation, and begins again", path)
            lines = []
        for line in lines:
            try:
                row, candidates = _row(line)
            except (ValueError, KeyError, TypeError, OSError):
                log.warning("%s: line %d is damaged; the prompts from there on are graded again", path, len(kept) + 2)
                break
            self.rows[row].append(candidates)
            kept.append(line)
        write_text_atomic(path, "".join(f"{line}\n" for line in (wanted, *kept)))

    def append(self, row: str, graded: Iterable[list[Candidate]]) -> None:
        with self.path.open("a") as file:
            for candidates in graded:
                record = {"row": row, "candidates": [_record(candidate) for candidate in candidates]}
                file.write(json.dumps(record) + "\n")

    def remove(self) -> None:
        """After the evaluation: the next one grades again."""
        self.path.unlink()


def _record(candidate: Candidate) -> dict[str, object]:
    values = {"score": candidate.score, "verdicts": [asdict(verdict) for verdict in candidate.verdicts]}
    if candidate.picture is None:
        return values
    buffer = io.BytesIO()
    candidate.picture.save(buffer, "png")
    return values | {"png": base64.b64encode(buffer.getvalue()).decode()}


def _row(line: str) -> tuple[str, list[Candidate]]:
    record = json.loads(line)
    return record["row"], [_candidate(values) for values in record["candidates"]]


def _candidate(record: Mapping[str, object]) -> Candidate:
    png = record.get("png")
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") if png else None
    return Candidate(picture, record["score"], tuple(Verdict(**values) for values in record["verdicts"]))
