"""The command `python -m clip_gen pull`: downloads published weights and converts them."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from clip_gen.files import checkpoints_folder, folder_lock
from clip_gen.weights.download import fetch
from clip_gen.weights.importers import openai_clip
from clip_gen.weights.importers.convert import DTYPES, import_clip, import_hfailab
from clip_gen.weights.importers.inception import check_inception_folder, import_inception
from clip_gen.weights.importers.lpips import check_lpips_folder, import_lpips
from clip_gen.weights.importers.upscaler import check_upscaler_folder, import_upscaler
from clip_gen.weights.model_folder import check_model_folder

CHECKPOINTS = checkpoints_folder()
HFAILAB = "https://github.com/HFAiLab/clip-gen/releases/download/v0.1.0"
OPENAI = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True)
class Published:
    """A published file."""

    url: str
    sha256: str | None = None  # or its first digits; None if none is published

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


CLIPS = {
    name: Published(f"{OPENAI}/{sha256}/{name.replace('/', '-').replace('@', '-')}.pt", sha256)
    for name, sha256 in openai_clip.SHA256.items()
}
COCO = {
    "vqgan": Published(f"{HFAILAB}/vqgan_coco.pt"),
    "gpt": Published(f"{HFAILAB}/gpt_coco.pt"),
    "clip": CLIPS["ViT-B/32"],  # the CLIP that the transformer was trained with
}
LPIPS = {
    "vgg": Published("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "linear": Published(
        "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",  # of the file in the repository
    ),
}
INCEPTION = Published(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
UPSCALER = Published(
    "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/RealESRGAN_x4plus.pth",
    "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",  # by several projects that download it
)
# Disk space that is needed while both the downloads and the converted folder exist.
COCO_BYTES = 5_000_000_000
CLIP_BYTES = 2_000_000_000
LPIPS_BYTES = 700_000_000
INCEPTION_BYTES = 250_000_000
UPSCALER_BYTES = 200_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["coco", "clip", "lpips", "inception", "upscaler"],
        help="coco: HFAiLab's model of photographs and its CLIP; clip: one of OpenAI's; lpips: for training stage 1; "
        "inception: for FID as published; upscaler: Real-ESRGAN, for larger pictures",
    )
    parser.add_argument("name", nargs="?", help=f"name of the CLIP: {', '.join(CLIPS)}".replace("%", "%%"))
    parser.add_argument("--out", type=Path, help="the folder to write; default: checkpoints/<name>")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the parameters on disk; default: as published, LPIPS in float16"
    )
    parser.add_argument(
        "--mirror",
        help="base URL of a mirror with the same file names; default: $CLIP_GEN_MIRROR; $https_proxy sets a proxy",
    )


def main(arguments: argparse.Namespace) -> None:
    out, mirror, dtype = arguments.out, arguments.mirror, DTYPES.get(arguments.dtype)
    if arguments.what == "clip":
        pull_clip(arguments.name, out, mirror, dtype)
    elif arguments.name:
        raise ValueError(f"{arguments.what} takes no name, and {arguments.name} was given; leave it out")
    elif arguments.what == "coco":
        pull_coco(out or CHECKPOINTS / "coco", mirror, dtype)
    elif arguments.what == "inception":
        pull_inception(out or CHECKPOINTS / "inception", mirror)
    elif arguments.what == "lpips":
        pull_lpips(out or CHECKPOINTS / "lpips", mirror, dtype)
    else:
        pull_upscaler(out or CHECKPOINTS / "upscaler", mirror, dtype)


def pull_clip(name: str | None, out: Path | None, mirror: str | None, dtype: torch.dtype | None) -> None:
    """Downloads one of OpenAI's CLIPs to a model folder."""
    if name not in CLIPS:
        raise ValueError(f'the name of the CLIP is "{name or ""}"; give one of {", ".join(CLIPS)}')
    clip = CLIPS[name]
    out = out or CHECKPOINTS / f"clip-{clip.name.removesuffix('.pt').lower()}"
    check_model_folder(out)
    with pulled({"clip": clip}, out, mirror, CLIP_BYTES) as files:
        import_clip(files["clip"], out, dtype)


def pull_coco(out: Path, mirror: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Downloads HFAiLab's model and the CLIP it was trained with to a model folder."""
    check_model_folder(out)
    with pulled(COCO, out, mirror, COCO_BYTES) as files:
        import_hfailab(files["vqgan"], files["gpt"], out, files["clip"], dtype=dtype)


def pull_lpips(out: Path, mirror: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Downloads torchvision's VGG-16 and LPIPS's linear layers to one folder, for the perceptual loss of stage 1."""
    check_lpips_folder(out)
    with pulled(LPIPS, out, mirror, LPIPS_BYTES) as files:
        urls = {part: file.url for part, file in LPIPS.items()}
        import_lpips(files["vgg"], files["linear"], out, urls, dtype or torch.float16)


def pull_inception(out: Path, mirror: str | None = None) -> None:
    """Downloads InceptionV3 in the weights of the original FID to one folder."""
    check_inception_folder(out)
    with pulled({"inception": INCEPTION}, out, mirror, INCEPTION_BYTES) as files:
        import_inception(files["inception"], out, INCEPTION.url)


def pull_upscaler(out: Path, mirror: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Downloads Real-ESRGAN to one folder, for output_size."""
    check_upscaler_folder(out)
    with pulled({"upscaler": UPSCALER}, out, mirror, UPSCALER_BYTES) as files:
        import_upscaler(files["upscaler"], out, UPSCALER.url, dtype)


@contextmanager
def pulled(files: dict[str, Published], out: Path, mirror: str | None, room: int) -> Iterator[dict[str, Path]]:
    """Downloads files, and removes them after they were converted.

    After an error they are kept, so that the same command resumes; except unusable files without a known SHA-256.
    """
    mirror = mirror or os.environ.get("CLIP_GEN_MIRROR")
    if mirror and not mirror.startswith(("http://", "https://")):
        raise ValueError(f'mirror is "{mirror}"; give an address that begins with http:// or https://')
    folder = out.parent / f".pulling-{out.name}"
    with folder_lock(folder, f"{out} is being pulled already; wait for the other to end"):
        free, needed = shutil.disk_usage(folder).free, room - sum(path.stat().st_size for path in folder.iterdir())
        if free < needed:
            raise ValueError(f"{folder}: {free / 1e9:.1f} GB are free there, wanted are {needed / 1e9:.1f}; make room")
        paths = {part: folder / file.name for part, file in files.items()}
        for part, file in files.items():
            address = f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url
            fetch(address, paths[part], file.sha256)
        try:
            yield paths
        except ValueError:
            for part, file in files.items():
                if file.sha256 is None:  # the server may have sent something else
                    paths[part].unlink(missing_ok=True)
            raise
    shutil.rmtree(folder)
