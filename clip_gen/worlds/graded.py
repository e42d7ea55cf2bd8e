"""Graded candidates, and the file that keeps them during an evaluation, so that an interrupted one resumes."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

from PIL import Image

from clip_gen.files import write_text_atomic


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

    about: what the candidates depend on. A file about something else, or a line that was cut short, is dropped.
    """

    def __init__(self, path: Path, about: Mapping[str, object]):
        self.path, self.rows = path, defaultdict(list)
        text = path.read_text() if path.is_file() else ""
        first, *lines = text.splitlines()[: text.count("\n")] or [""]
        if first != json.dumps(about):
            first, lines = json.dumps(about), []
        write_text_atomic(path, "".join(f"{line}\n" for line in (first, *lines)))
        for line in lines:
            record = json.loads(line)
            self.rows[record["row"]].append([_candidate(values) for values in record["candidates"]])

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


def _candidate(record: Mapping[str, object]) -> Candidate:
    png = record.get("png")
    picture = Image.open(io.BytesIO(base64.b64decode(png))) if png else None
    return Candidate(picture, record["score"], tuple(Verdict(**values) for values in record["verdicts"]))
