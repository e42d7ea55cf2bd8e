"""The drawings of the page, kept in a folder, so that they survive a reload and a restart."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from clip_gen.enlarging import enlarger
from clip_gen.files import write_text_atomic
from clip_gen.images import resized_square
from clip_gen.info import shell_command
from clip_gen.picture_files import INPUT_PICTURES, description, write_pictures
from clip_gen.pipeline import ClipGen, Generation
from clip_gen.sampling.condition import open_picture

SETTINGS = "settings.json"
Stop = Callable[[], bool]
NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")  # of a drawing's folder


@dataclass(frozen=True)
class Drawing:
    """The pictures of one request, best first, and their settings."""

    folder: Path
    settings: dict[str, object]  # as in settings.json

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def pictures(self) -> list[Path]:
        return [self.folder / name for name in self.settings["files"]]

    @property
    def sheet(self) -> Path | None:
        return next(iter(self.folder.glob("grid.*")), None)

    @property
    def title(self) -> str:
        return str(self.settings.get("prompt") or "variations of a picture")

    def input_picture(self, name: str) -> Path | None:
        """The kept square of `image`, `init_image` or `mask`."""
        path = self.folder / f"{name}.png"
        return path if path.is_file() else None

    def captions(self) -> list[str]:
        return [f"{score:.3f} · seed {self.settings['seed']}" for score in self.settings["scores"]]


def keep_input_pictures(settings: Mapping[str, object], folder: Path, resolution: int) -> dict[str, object]:
    """The settings with the central squares of their pictures, at the model's own size, in the folder.

    The model sees nothing else of a picture. So the drawing can be repeated, and neither a photograph's EXIF nor its
    margins are kept.
    """
    kept = {}
    for name in (name for name in INPUT_PICTURES if settings[name]):
        kept[name] = folder / f"{name}.png"
        resized_square(open_picture(settings[name], name), resolution).save(kept[name])
    return {**settings, **kept}


class History:
    """Drawings in a folder, each in one of its own. Folders of other names are left alone."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        """A folder for a drawing, which is removed if the drawing fails. OSError if there can be none."""
        folder = self.folder / f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        folder.mkdir(parents=True)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def add(
        self, folder: Path, model: ClipGen, name: str, result: Generation, settings: Mapping[str, object], stop: Stop
    ) -> Drawing:
        """Writes the pictures and settings.json. name: of the model. OSError if they cannot be written."""
        output_format, about = settings["output_format"], description(model, result, settings)
        paths = [folder / f"{i}.{output_format}" for i in range(len(result.images))]
        write_pictures(
            result,
            paths,
            about if settings["output_metadata"] else None,
            output_format,
            settings["output_quality"],
            folder / f"grid.{output_format}" if settings["output_grid"] else None,
            enlarger(settings["output_size"], model.device, stop),
        )
        command = shell_command({key: str(value) for key, value in about.items()}, name)
        about |= {"weights": name, "scores": [round(score, 4) for score in result.scores], "command": command}
        about |= {"files": [path.name for path in paths], "warnings": [*result.warnings, *result.notes]}
        write_text_atomic(folder / SETTINGS, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        return Drawing(folder, about)

    def drawings(self) -> list[Drawing]:
        """All that are complete, newest first."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        names = sorted((path.name for path in folders if NAME.fullmatch(path.name)), reverse=True)
        return [drawing for drawing in map(self.find, names) if drawing]

    def find(self, name: str | None) -> Drawing | None:
        """The drawing of a name; None if there is none, or no complete one."""
        if not name or not NAME.fullmatch(name):
            return None
        try:
            settings = json.loads((self.folder / name / SETTINGS).read_text(encoding="utf-8"))
            drawing = Drawing(self.folder / name, settings)
            return drawing if all(path.is_file() for path in drawing.pictures) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remove(self, name: str) -> None:
        if NAME.fullmatch(name):
            shutil.rmtree(self.folder / name, ignore_errors=True)
