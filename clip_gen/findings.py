"""What was found in an archive: the pictures of use, and every other file with the reason why not."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
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
    """The files to train on, in the order of their original names, and what was found beside them."""

    paths: list[Path]
    skipped: list[Skipped]

    def as_json(self) -> dict[str, object]:
        """For training.json: how many are used, and each of the rest with its reason."""
        return {"used": len(self.paths), "skipped": [asdict(skipped) for skipped in self.skipped]}

    def summary(self) -> str:
        """Half a sentence: how many are used, and how many not for which reason."""
        reasons = Counter(skipped.reason for skipped in self.skipped).most_common()
        rest = ", ".join(f"{reason}: {count}" for reason, count in reasons)
        of_use = "1 picture" if len(self.paths) == 1 else f"{len(self.paths)} pictures"
        return f"{of_use} of use" + (f"; skipped: {rest}" if rest else "")

    def write_index(self, folder: Path) -> None:
        """Notes all of this in the folder that holds the files, for unpacked()."""
        index = {"files": [path.name for path in self.paths], **self.as_json()}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def unpacked(folder: Path) -> Pictures:
    """What archives.unpack returned when it made this folder; OSError or ValueError when it never did."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return Pictures([folder / name for name in index["files"]], [Skipped(**one) for one in index["skipped"]])


def shown(text: str) -> str:
    """Anybody's text made fit for a log and a page: printable, and no longer than is readable."""
    printable = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return printable if len(printable) <= LONGEST_SHOWN else printable[: LONGEST_SHOWN - 3] + "..."
