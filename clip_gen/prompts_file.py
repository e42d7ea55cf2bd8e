"""Many prompts from a file: `python -m clip_gen generate --prompts-file prompts.txt`."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from clip_gen.enlarging import enlarger
from clip_gen.files import sha256_of
from clip_gen.picture_files import INPUT_PICTURES, check_folder, description, drawing_settings, write_pictures
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.progress_bar import LiveBar

MANIFEST = "manifest.jsonl"
AT_ONCE, ROWS = 8, 64  # lines drawn together, or more if they have fewer candidates than these together


@dataclass(frozen=True)
class Line:
    number: int  # in the file, from 1
    settings: dict[str, object]  # with `prompt`

    def key(self, model: ClipGen) -> str:
        """The same for a line that draws the same again, or with another random seed if it names none."""
        pictures = {name: self.settings[name] and sha256_of(self.settings[name]) for name in INPUT_PICTURES}
        asked = self.settings | pictures | {"line": self.number, "model": model.sha256}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def names(self, start: str) -> list[str]:
        """Of the pictures, best first, and last of their contact sheet if there is one."""
        numbers = [*range(self.settings["num_outputs"]), *(["grid"] if self.settings["output_grid"] else [])]
        return [f"{start}{self.number:04}.{number}.{self.settings['output_format']}" for number in numbers]


def read_prompts(path: Path, kinds: Mapping[str, type]) -> Iterator[tuple[int, dict[str, object]]]:
    """The numbers of the lines that are not blank, and their settings.

    A .csv file has a header with `prompt` and names of settings, a .jsonl file an object of them in each line; in other
    files a line is a prompt. kinds: the settings and their types. ValueError with the line for what does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({reason}); give a text, CSV or JSONL file in UTF-8") from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows = csv.DictReader(text.splitlines(keepends=True))
        numbered = ((rows.line_num, {name: cell for name, cell in row.items() if cell}) for row in rows)
    else:
        numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip())
    for number, line in numbered:
        try:
            values = json.loads(line) if suffix == ".jsonl" else {"prompt": line} if isinstance(line, str) else line
            if not isinstance(values, dict):
                raise ValueError(f'{values!r} is no object such as {{"prompt": "a star", "seed": 7}}')
            settings = {name: _typed(name, value, kinds) for name, value in values.items() if value is not None}
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
        yield number, settings


def draw_lines(
    model: ClipGen,
    lines: Sequence[Line],
    folder: Path,
    start: str = "",
    overwrite: bool = False,
    has_bar: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Draws the lines, and writes the pictures and the manifest.

    start: of the files' names. say: gets a sentence for each line. ValueError if files have these names and are of
    other prompts, unless overwrite.
    """
    _claim_names(model, lines, folder, start, overwrite)
    stop, writing = threading.Event(), threading.Lock()
    bar = LiveBar(len(lines) if has_bar else 0)

    def draw(line: Line) -> str:
        settings = drawing_settings(line.settings)
        result = model.generate(**settings, should_stop=stop.is_set, on_progress=bar.listener())
        paths = [folder / name for name in line.names(start)]
        about = description(model, result, line.settings)
        records = _records(line, model, result, paths, about)
        # Before the pictures: after a kill between the two, the next run must know whose pictures they are.
        with writing, _locked(folder / MANIFEST) as manifest:
            manifest.write(_as_lines(records))
        _write(line, model, result, paths, about, stop.is_set)
        return f"{folder / records[0]['file']}  score {result.scores[0]:.4f}  {line.settings['prompt']}"

    with bar, ThreadPoolExecutor(_at_once(lines)) as pool:
        drawing = {pool.submit(draw, line): line for line in lines}
        try:
            for done in as_completed(drawing):
                with bar.hidden():
                    say(done.result())
        except ValueError as error:
            raise ValueError(f"line {drawing[done].number}: {error}") from error
        finally:  # of an error or Ctrl-C; does nothing after the last line
            stop.set()
            pool.shutdown(cancel_futures=True)


def undrawn_lines(model: ClipGen, lines: Sequence[Line], folder: Path) -> list[Line]:
    """The lines without all their pictures in the folder."""
    records = _read_manifest(folder)
    there = Counter(record["key"] for record in records if (folder / record["file"]).is_file())
    finished = {record["key"] for record in records if there[record["key"]] == record["num_outputs"]}
    return [line for line in lines if line.key(model) not in finished]


def _claim_names(model: ClipGen, waiting: Sequence[Line], folder: Path, start: str, overwrite: bool) -> None:
    """Makes the folder ready for the pictures of lines. ValueError if files of their names are of other prompts."""
    names = {name for line in waiting for name in line.names(start)}
    keys = {line.key(model) for line in waiting}
    ours = {record["file"] for record in _read_manifest(folder) if record["key"] in keys}
    check_folder(folder, sorted(names - ours), overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    _forget(folder / MANIFEST, names)


def _at_once(lines: Sequence[Line]) -> int:
    """How many lines to draw together: their candidates fill the batches."""
    fewest = min((line.settings["candidates"] for line in lines), default=1)
    return max(AT_ONCE, -(-ROWS // fewest))


@contextmanager
def _locked(manifest: Path) -> Iterator[IO[str]]:
    """The manifest, to append to, while no other process does."""
    with manifest.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _forget(manifest: Path, names: Collection[str]) -> None:
    """Removes the records of files of these names. In place, because other processes may be waiting for the lock."""
    with _locked(manifest) as file:
        records = _read_manifest(manifest.parent)
        kept = _as_lines(record for record in records if record["file"] not in names)
        file.seek(0)
        if file.read() != kept:
            file.truncate(0)
            file.write(kept)


def _records(
    line: Line, model: ClipGen, result: Generation, paths: Sequence[Path], about: dict[str, object]
) -> list[dict[str, object]]:
    """The records of a line's pictures, which have what a picture's metadata has."""
    numbered = enumerate(zip(paths[: len(result.images)], result.scores, strict=True))
    own = [{"file": path.name, "number": number, "score": round(score, 4)} for number, (path, score) in numbered]
    return [one | {"line": line.number, "key": line.key(model)} | about for one in own]


def _write(
    line: Line,
    model: ClipGen,
    result: Generation,
    paths: Sequence[Path],
    about: dict[str, object],
    should_stop: Callable[[], bool],
) -> None:
    """Writes the pictures of a line."""
    sheet = paths[-1] if line.settings["output_grid"] else None
    metadata, paths = about if line.settings["output_metadata"] else None, paths[: len(result.images)]
    output_format, quality, size = (line.settings[f"output_{name}"] for name in ("format", "quality", "size"))
    enlarge = enlarger(size, model.device, should_stop)
    write_pictures(result, paths, metadata, output_format, quality, sheet, enlarge)


def _as_lines(records: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _typed(name: str, value: object, kinds: Mapping[str, type]) -> object:
    """A setting in its type; texts of numbers and of true and false are converted."""
    if name is None:
        raise ValueError("it has more cells than the header")
    if name not in kinds:
        raise ValueError(f"there is no setting {name!r}; the settings are {', '.join(kinds)}")
    kind = kinds[name]
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {value!r}; give true or false")
        return value.lower() == "true"
    try:
        return kind(value)
    except ValueError as error:
        noun = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {value!r}; give {noun}") from error


def _read_manifest(folder: Path) -> list[dict[str, object]]:
    """The records of pictures that are there. A line that was cut off when the process was killed is left out."""
    records = []
    if (folder / MANIFEST).is_file():
        for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and {"file", "key", "num_outputs"} <= record.keys():
                records.append(record)
    return records
