"""Result of reading an archive: the usable pictures, and the skipped files with the reasons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

INDEX = "pictures.json"
MAX_SHOWN = 200  # characters of a file's original name


@dataclass(frozen=True)
class Skipped:
    """A file that is not used: its name in the archive, the reason, and a detail or ""."""

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Pictures:
    """The files to train on, in the order of their original names; the skipped files; and how many files were
    converted in which way (notes).

    Of shards also the names of the pictures in them, and about how many they hold, if only some are kept.
    """

    paths: list[Path]
    skipped: list[Skipped]
    notes: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    estimated: int = 0

    @property
    def count(self) -> int:
        """How many pictures there are to train on."""
        return self.estimated or len(self.paths)

    def names_of(self, paths: Collection[Path]) -> list[str]:
        """The names in their shards of some of these files."""
        wanted = set(paths)
        return [name for path, name in zip(self.paths, self.names, strict=True) if path in wanted]

    def as_json(self) -> dict[str, object]:
        """For training.json: number of files used, notes, and skipped files with their reasons."""
        skipped = [asdict(skipped) for skipped in self.skipped]
        values = {"used": len(self.paths), "notes": self.notes, "skipped": skipped}
        return values | ({"estimated": self.estimated} if self.estimated else {})

    def summary(self) -> str:
        """Part of a sentence: number of pictures used, notes, and number of files skipped for each reason."""
        usable = "1 usable picture" if len(self.paths) == 1 else f"{len(self.paths)} usable pictures"
        notes = f"; of these: {_counts(self.notes.items())}" if self.notes else ""
        skipped = _counts(Counter(skipped.reason for skipped in self.skipped).most_common())
        return usable + notes + (f"; skipped: {skipped}" if skipped else "")

    def write_index(self, place: Path, folder: Path) -> None:
        """Writes this into `place`, which will become the pictures' folder, for unpacked()."""
        files = [path.relative_to(folder).as_posix() for path in self.paths]
        index = {"files": files, "names": self.names, **self.as_json()}
        (place / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def unpacked(folder: Path) -> Pictures:
    """The result of archive.unpack that made this folder. OSError or ValueError if the folder is from elsewhere."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    skipped = [Skipped(**one) for one in index["skipped"]]
    paths = [folder / name for name in index["files"]]
    return Pictures(paths, skipped, index.get("notes", {}), index.get("names", []), index.get("estimated", 0))


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return "; ".join(f"{what} ({count:,})" for what, count in counts)


def shown(text: str) -> str:
    """A text for logs and HTML pages: printable characters only, MAX_SHOWN at most."""
    printable = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return printable if len(printable) <= MAX_SHOWN else printable[: MAX_SHOWN - 3] + "..."
