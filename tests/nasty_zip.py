"""A zip such as people upload: photographs and other files. `.venv/bin/python tests/nasty_zip.py OUT` writes it."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

FIXTURES = Path(__file__).parent / "fixtures"
TOP = "Mein Urlaub 2024"
FIRST, SECOND = f"{TOP}/Strände & Küste 🏖️", f"{TOP}/日本/a b c"


def photographs(count: int, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Image.Image]:
    """Blurred colour noise with grain."""
    for _ in range(count):
        low = rng.normal(128, 70, (10, 14, 3)).clip(0, 255).astype(np.uint8)
        blurred = Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
        yield Image.fromarray(
            (np.asarray(blurred) + rng.normal(0, 12, (size[1], size[0], 3))).clip(0, 255).astype("u1")
        )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def usual_files(photos: list[Image.Image]) -> dict[str, bytes]:
    """Two folders of photographs, copies of three, and what file managers add."""
    half = len(photos) // 2
    files = {f"{FIRST}/IMG {i}.jpg": encoded(image, "JPEG", quality=92) for i, image in enumerate(photos[:half])}
    files |= {f"{SECOND}/{i}.jpeg": encoded(image, "JPEG", quality=92) for i, image in enumerate(photos[half:])}
    files |= {f"{TOP}/copy of {i}.jpg": files[f"{FIRST}/IMG {i}.jpg"] for i in range(3)}
    return files | {
        f"__MACOSX/{TOP}/._IMG.jpg": b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(100),
        f"{TOP}/Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000),
        f"{TOP}/.DS_Store": b"\0\0\0\1Bud1" + bytes(1000),
        f"{TOP}/desktop.ini": b"[.ShellClassInfo]",
    }


def useful_files(photos: Iterator[Image.Image], huge: tuple[int, int]) -> dict[str, bytes]:
    """Pictures of every format and mode, some with odd names."""
    turned = Image.Exif()
    turned[0x112] = 6
    grey, floating = np.asarray(next(photos).convert("L")), np.asarray(next(photos).convert("L"))
    several = [next(photos).resize((100, 100)) for _ in range(4)]
    return {
        "sixteen-bit.png": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "cmyk.jpg": encoded(next(photos).convert("CMYK"), "JPEG"),
        "palette-transparent.png": encoded(next(photos).quantize(64), "PNG", transparency=3),
        "animated.gif": encoded(several[0], "GIF", save_all=True, append_images=several[1:]),
        "animated.webp": encoded(several[1], "WEBP", save_all=True, append_images=several[2:]),
        "animated.png": encoded(several[2], "PNG", save_all=True, append_images=several[3:]),
        "multi-page.tiff": encoded(several[3], "TIFF", save_all=True, append_images=several[:2]),
        "two-in-one.mpo": encoded(next(photos), "MPO", save_all=True, append_images=several[:1]),
        "huge.jpg": encoded(next(photos).resize(huge), "JPEG", quality=60),
        "png-called.jpg": encoded(next(photos), "PNG"),
        "no-extension": encoded(next(photos), "JPEG"),
        "jpeg-called.txt": encoded(next(photos), "JPEG"),
        "progressive.jpg": encoded(next(photos), "JPEG", progressive=True),
        "grey.jpg": encoded(next(photos).convert("L"), "JPEG"),
        "bilevel.tif": encoded(next(photos).convert("1"), "TIFF", compression="group4"),
        "float.tif": encoded(Image.fromarray(floating.astype(np.float32) / 255), "TIFF"),
        "lab.tif": encoded(next(photos).convert("LAB"), "TIFF"),
        "l" * 200 + ".jpg": encoded(next(photos), "JPEG"),
        "new\nline.jpg": encoded(next(photos), "JPEG"),
        "<b>bold<b>&amp;'\".jpg": encoded(next(photos), "JPEG"),
        "x.ico": encoded(next(photos), "ICO"),
        "x.ppm": encoded(next(photos), "PPM"),
        "x.tga": encoded(next(photos), "TGA"),
        "x.jp2": encoded(next(photos), "JPEG2000"),
        "x.bmp": encoded(next(photos), "BMP"),
        "x.avif": encoded(next(photos), "AVIF"),
        "turned.jpg": encoded(next(photos), "JPEG", exif=turned),
        "IMG_0001.HEIC": (FIXTURES / "heic" / "plain.heic").read_bytes(),
    }


def useless_files(photos: Iterator[Image.Image], rng: np.random.Generator) -> dict[str, bytes]:
    """Files that must be skipped, most of them named like pictures."""
    jpeg = encoded(next(photos), "JPEG")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("inside.jpg", encoded(next(photos), "JPEG"))
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated-early.jpg": jpeg[:300],
        "empty.jpg": b"",
        "one-pixel.png": encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG"),
        "strip.png": encoded(next(photos).resize((20000, 50)), "PNG"),
        "text-called.jpg": b"I am text\n" * 50,
        "notes.txt": b"notes",
        "page-called.jpg": b"<!DOCTYPE html><html><title>404</title></html>",
        "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="50" height="50"><circle r="20"/></svg>',
        "raw.CR2": b"II*\0\x10\0\0\0CR\2\0" + rng.bytes(2000),
        "scan.pdf": encoded(next(photos), "PDF"),
        "flat-grey.png": encoded(Image.new("RGB", (300, 300), (128, 128, 128)), "PNG"),
        "all-transparent.png": encoded(Image.new("RGBA", (300, 300), (0, 0, 0, 0)), "PNG"),
        "inner.zip": inner.getvalue(),
    }


def write_nasty_zip(
    path: Path, holiday: int = 12, size: tuple[int, int] = (105, 75), huge: tuple[int, int] = (12000, 9000)
) -> Path:
    """Writes `holiday` photographs in two folders and one of each other kind, of `size` pixels where possible."""
    rng = np.random.default_rng(0)
    photos = list(photographs(holiday + 36, size, rng))
    rest = iter(photos[holiday:])
    odd = useful_files(rest, huge) | useless_files(rest, rng)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (usual_files(photos[:holiday]) | {f"odd/{name}": odd[name] for name in odd}).items():
            archive.writestr(name, content)
    return path


if __name__ == "__main__":
    write_nasty_zip(Path(sys.argv[1]), holiday=80, size=(420, 300))
