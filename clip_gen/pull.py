"""The command `python -m clip_gen pull`: downloads published weights and converts them to a model folder."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_gen.importers.command import DTYPES
from clip_gen.importers.folder import check_replaceable, import_clip, import_hfailab
from clip_gen.transfer import check_room, fetch

CHECKPOINTS = Path("checkpoints")
HFAILAB = "https://github.com/HFAiLab/clip-gen/releases/download/v0.1.0"
OPENAI = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True)
class Published:
    """A file on the web."""

    url: str
    sha256: str | None = None  # None: its publisher names none

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def _openai(sha256: str, name: str) -> Published:
    return Published(f"{OPENAI}/{sha256}/{name}.pt", sha256)


CLIPS = {
    "RN50": _openai("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50"),
    "RN101": _openai("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101"),
    "RN50x4": _openai("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4"),
    "RN50x16": _openai("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16"),
    "RN50x64": _openai("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64"),
    "ViT-B/32": _openai("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32"),
    "ViT-B/16": _openai("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16"),
    "ViT-L/14": _openai("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14"),
    "ViT-L/14@336px": _openai("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px"),
}
COCO = {
    "vqgan": Published(f"{HFAILAB}/vqgan_coco.pt"),
    "gpt": Published(f"{HFAILAB}/gpt_coco.pt"),
    "clip": CLIPS["ViT-B/32"],  # what the transformer was trained with; this copy of it has a known sha256
}
# Downloads and the folder made of them lie side by side for a while: 570 M parameters as published, twice.
COCO_BYTES = 5_000_000_000
CLIP_BYTES = 2_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["coco", "clip"])
    parser.add_argument("name", nargs="?", help=f"of the CLIP: {', '.join(CLIPS)}".replace("%", "%%"))
    parser.add_argument("--out", type=Path, help="the model folder to write; checkpoints/<name> if not given")
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters on disk; else as they were published")
    parser.add_argument(
        "--mirror",
        help="address of a folder with files of the same names, else $CLIP_GEN_MIRROR; $https_proxy sets a proxy",
    )


def main(arguments: argparse.Namespace) -> None:
    dtype = DTYPES.get(arguments.dtype)
    if arguments.what == "coco":
        if arguments.name:
            raise ValueError(f"coco takes no name, and {arguments.name} was given; leave it out")
        pull_coco(arguments.out or CHECKPOINTS / "coco", arguments.mirror, dtype)
        return
    if arguments.name not in CLIPS:
        raise ValueError(f"there is no CLIP {arguments.name}; name one of {', '.join(CLIPS)}")
    clip = CLIPS[arguments.name]
    out = arguments.out or CHECKPOINTS / f"clip-{clip.name.removesuffix('.pt').lower()}"
    with pulled({"clip": clip}, out, arguments.mirror, CLIP_BYTES) as files:
        import_clip(files["clip"], out, dtype)


def pull_coco(out: Path, mirror: str | None = None, dtype: torch.dtype | None = None) -> None:
    """HFAiLab's model and the CLIP it was trained with, as a model folder."""
    with pulled(COCO, out, mirror, COCO_BYTES) as files:
        import_hfailab(files["vqgan"], files["gpt"], out, files["clip"], dtype=dtype)


@contextmanager
def pulled(files: dict[str, Published], out: Path, mirror: str | None, room: int) -> Iterator[dict[str, Path]]:
    """The downloaded files, for as long as they are needed: removed when all went well.

    After an error they are kept, so that the same command goes on; but not a file that proved to be of no use.
    """
    check_replaceable(out)
    mirror = mirror or os.environ.get("CLIP_GEN_MIRROR")
    folder = out.parent / f".pulling-{out.name}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is being pulled already; wait for the other to end") from None
        here = sum(path.stat().st_size for path in folder.iterdir())
        check_room(folder, room - here)
        paths = {part: folder / file.name for part, file in files.items()}
        for part, file in files.items():
            fetch(f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url, paths[part], file.sha256)
        try:
            yield paths
        except ValueError:
            for part, file in files.items():
                if file.sha256 is None:  # whatever the server sent, asking again is the only way to something better
                    paths[part].unlink(missing_ok=True)
            raise
    shutil.rmtree(folder)
