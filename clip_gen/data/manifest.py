"""What an archive holds: the pictures of use, and every other file with the reason why it is skipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

INDEX = "pictures.json"
LONGEST_SHOWN = 200  # characters of a file's original name


@dataclass(frozen=True)
class Skipped:
    """A file that is not used: its name in the archive, why, and, where there is more to say, a detail."""

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Pictures:
    """The files to train on, in the order of their original names; the skipped files; and notes on the files used: what
    was done to them, with the number of files each.
    """

    paths: list[Path]
    skipped: list[Skipped]
    notes: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """For training.json: how many are used, the notes on them, and each skipped file with its reason."""
        skipped = [asdict(skipped) for skipped in self.skipped]
        return {"used": len(self.paths), "notes": self.notes, "skipped": skipped}

    def summary(self) -> str:
        """Part of a sentence: how many are used, the notes on them, and how many are skipped for which reason."""
        of_use = "1 picture of use" if len(self.paths) == 1 else f"{len(self.paths)} pictures of use"
        done = f"; of these: {_counts(self.notes.items())}" if self.notes else ""
        skipped = _counts(Counter(skipped.reason for skipped in self.skipped).most_common())
        return of_use + done + (f"; skipped: {skipped}" if skipped else "")

    def write_index(self, folder: Path) -> None:
        """Writes all of this into the folder that holds the files, for unpacked()."""
        index = {"files": [path.name for path in self.paths], **self.as_json()}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def unpacked(folder: Path) -> Pictures:
    """What archives.unpack returned when it made this folder; OSError or ValueError when it did not make it."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    skipped = [Skipped(**one) for one in index["skipped"]]
    return Pictures([folder / name for name in index["files"]], skipped, index.get("notes", {}))


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return "; ".join(f"{what} ({count:,})" for what, count in counts)


def shown(text: str) -> str:
    """Any text made fit for a log and a page: printable characters, LONGEST_SHOWN at most."""
    printable = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return printable if len(printable) <= LONGEST_SHOWN else printable[: LONGEST_SHOWN - 3] + "..."
