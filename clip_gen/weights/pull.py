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
from clip_gen.weights.importers.convert import DTYPES, import_clip, import_hfailab, import_taming
from clip_gen.weights.importers.inception import check_inception_folder, import_inception
from clip_gen.weights.importers.lpips import check_lpips_folder, import_lpips
from clip_gen.weights.importers.upscaler import check_upscaler_folder, import_upscaler
from clip_gen.weights.model_folder import check_model_folder
from clip_gen.weights.url import open_url

CHECKPOINTS = checkpoints_folder()
HFAILAB = "https://github.com/HFAiLab/clip-gen/releases/download/v0.1.0"
OPENAI = "https://openaipublic.azureedge.net/clip/models"
HEIBOX = "https://heibox.uni-heidelberg.de/d"


@dataclass(frozen=True)
class Published:
    """A published file."""

    url: str
    sha256: str | None = None  # or its first digits; None if none is published
    saved_as: str = ""  # the file's name here and on a mirror; "": as at the end of the URL
    size: int = 0  # bytes, perhaps rounded; 0: unknown
    licence: str = "MIT"

    @property
    def name(self) -> str:
        return self.saved_as or self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.name} ({self.size / 1e6:.0f} MB, {self.licence})"


CLIP_SIZES = {  # bytes
    "RN50": 255_827_503,
    "RN101": 291_791_292,
    "RN50x4": 421_854_225,
    "RN50x16": 661_125_706,
    "RN50x64": 1_353_500_174,
    "ViT-B/32": 353_976_522,
    "ViT-B/16": 350_837_078,
    "ViT-L/14": 932_768_134,
    "ViT-L/14@336px": 934_088_680,
}
CLIPS = {
    name: Published(f"{OPENAI}/{sha256}/{name.replace('/', '-').replace('@', '-')}.pt", sha256, size=CLIP_SIZES[name])
    for name, sha256 in openai_clip.SHA256.items()
}


def taming_vqgan(folder: str, name: str, size: int, checkpoint: str | None, config: str | None) -> dict[str, Published]:
    """The two files of a VQGAN of taming-transformers. checkpoint, config: their SHA-256."""
    address = f"{HEIBOX}/{folder}/files/?p=%2F{{}}&dl=1"
    return {
        "config": Published(address.format("configs%2Fmodel.yaml"), config, f"{name}.yaml", 1000),
        "checkpoint": Published(address.format("ckpts%2Flast.ckpt"), checkpoint, f"{name}.ckpt", size),
    }


# The folders are those in the README of github.com/CompVis/taming-transformers. It publishes no SHA-256: these are of
# several projects that download the files.
VQGANS = {
    "imagenet-f16-1024": taming_vqgan("8088892a516d4e3baf92", "vqgan_imagenet_f16_1024", 958_000_000, None, None),
    "imagenet-f16-16384": taming_vqgan(
        "a7530b09fed84f80a887",
        "vqgan_imagenet_f16_16384",
        980_092_370,
        "845a68805098cb666420d5db93df53f3a3b6dd443e6dd85c05759c5b998cd663",
        "00e2c6189926f1d89ecfef73e9598db77981c1982f0555fbade963ffd16143c7",
    ),
    "openimages-f8-8192": taming_vqgan(
        "2e5662443a6b4307b470",
        "vqgan_gumbel_f8",
        376_581_823,
        "5cd6c74810ab97e00e942c25403f73afc081e8b19987b31ec0d9ff5b68e7ab14",
        "91110bab325067b37f85d1e75895a837d59c292bae4f3097f80c518714d5caff",
    ),
}
COCO = {
    "vqgan": Published(f"{HFAILAB}/vqgan_coco.pt"),
    "gpt": Published(f"{HFAILAB}/gpt_coco.pt"),
    "clip": CLIPS["ViT-B/32"],  # the CLIP that the transformer was trained with
}
LPIPS = {
    "vgg": Published("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af", licence="BSD-3-Clause"),
    "linear": Published(
        "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",  # of the file in the repository
        licence="BSD-2-Clause",
    ),
}
INCEPTION = Published(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    licence="Apache-2.0",
)
UPSCALER = Published(
    "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/RealESRGAN_x4plus.pth",
    "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",  # by several projects that download it
    licence="BSD-3-Clause",
)
# Disk space that is needed while both the downloads and the converted folder exist.
COCO_BYTES = 5_000_000_000
CLIP_BYTES = 2_000_000_000
VQGAN_BYTES = 1_500_000_000
LPIPS_BYTES = 700_000_000
INCEPTION_BYTES = 250_000_000
UPSCALER_BYTES = 200_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["coco", "clip", "vqgan", "lpips", "inception", "upscaler"],
        help="coco: HFAiLab's model of photographs and its CLIP; clip: one of OpenAI's; vqgan: one of "
        "taming-transformers'; lpips: for training stage 1; inception: for FID as published; upscaler: Real-ESRGAN, "
        "for larger pictures",
    )
    names = f"name of the CLIP: {', '.join(CLIPS)}; or of the VQGAN: {', '.join(VQGANS)}"
    parser.add_argument("name", nargs="?", help=names)
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
    elif arguments.what == "vqgan":
        pull_vqgan(arguments.name, out, mirror, dtype)
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


def pull_clip(
    name: str | None, out: Path | None = None, mirror: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Downloads one of OpenAI's CLIPs to a model folder."""
    if name not in CLIPS:
        raise ValueError(f'the name of the CLIP is "{name or ""}"; give one of {", ".join(CLIPS)}')
    out = out or clip_folder(name)
    check_model_folder(out)
    with pulled({"clip": CLIPS[name]}, out, mirror, CLIP_BYTES) as files:
        import_clip(files["clip"], out, dtype)


def clip_folder(name: str) -> Path:
    """Where `pull clip` writes one of CLIPS."""
    return CHECKPOINTS / f"clip-{CLIPS[name].name.removesuffix('.pt').lower()}"


def pull_vqgan(
    name: str | None, out: Path | None = None, mirror: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Downloads one of taming's VQGANs to a model folder without transformer and CLIP."""
    if name not in VQGANS:
        raise ValueError(f'the name of the VQGAN is "{name or ""}"; give one of {", ".join(VQGANS)}')
    out = out or vqgan_folder(name)
    check_model_folder(out)
    with pulled(VQGANS[name], out, mirror, VQGAN_BYTES) as files:
        import_taming(files["config"], files["checkpoint"], out, dtype)


def vqgan_folder(name: str) -> Path:
    """Where `pull vqgan` writes one of VQGANS."""
    return CHECKPOINTS / f"vqgan-{name}"


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
            fetch(_address(file, mirror), paths[part], file.sha256)
        try:
            yield paths
        except ValueError:
            for part, file in files.items():
                if file.sha256 is None:  # the server may have sent something else
                    paths[part].unlink(missing_ok=True)
            raise
    shutil.rmtree(folder)


def _address(file: Published, mirror: str | None) -> str:
    return f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url


def check_reachable(file: Published) -> None:
    """OSError, HTTPException or ValueError unless the server, or the mirror, sends the first byte of the file."""
    with open_url(_address(file, os.environ.get("CLIP_GEN_MIRROR")), headers={"Range": "bytes=0-0"}) as reply:
        reply.read1(1)
