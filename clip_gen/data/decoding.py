"""Picture files of all common formats to upright RGB in sRGB. The content decides the format, not the name."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import _pi_heif
import numpy as np
from PIL import IcoImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin

from clip_gen.data.colours import in_srgb, on_background
from clip_gen.data.file_kinds import CAMERA_RAW, HEAD_BYTES, UnusableError, kind_of

BROKEN = "cut off or damaged"
ONE_COLOUR = "one colour all over"
UNKNOWN_RANGE = "32-bit pixels, whose black and white are not known: save with 8 or 16 bits"
TOO_SMALL = "too small"
TOO_THIN = "too thin"
TOO_LARGE = "too many pixels"

# Notes: what was done to a picture that is used.
FIRST_FRAME = "several frames or pages, the first used"
SMALLER = "very large JPEG, read at a smaller scale"

MAX_PIXELS = 2**26  # of one picture: takes 0.5 GB while it is decoded, as WebP 1 GB, as JPEG 2000 1.2 GB
HEIC_THREADS = 4  # to decode one picture
JPEG_SCALES = (1, 2, 4, 8)  # reductions at which libjpeg decodes without holding the whole picture
FLAT = 8  # levels of 255 by which a picture counted as one colour may vary

DNG_VERSION = 50706  # a TIFF with this tag is camera raw


@dataclass(frozen=True)
class Decoded:
    """A picture as RGB, and notes on how it was converted."""

    image: Image.Image
    notes: tuple[str, ...]


def load_picture(path: Path, wanted_side: int | None = None) -> Image.Image:
    """The picture as RGB; see `decode`."""
    return decode(path, wanted_side=wanted_side).image


def as_rgb(image: Image.Image) -> Image.Image:
    """A copy of an open image, as `decode` gives it. UnusableError for 32-bit pixels that are not from 0 to 1."""
    return _upright_rgb(image.copy(), "")[0]


def decode(
    path: Path | bytes,
    min_side: int = 1,
    max_aspect: float = math.inf,
    max_pixels: int = MAX_PIXELS,
    wanted_side: int | None = None,
) -> Decoded:
    """The picture as RGB in sRGB: upright by its EXIF, on an opaque background, 16-bit grey scaled to 8 bits.

    A JPEG of more than `max_pixels` is decoded at a half, a quarter or an eighth of its size. So is one that still is
    at least `wanted_side` pixels wide and high. UnusableError if the file is not a picture, is damaged, or is too
    small, thin or large. OSError if there is no file. path: of the file, or its content.
    """
    _silence_pillow()
    is_content = isinstance(path, bytes)
    with io.BytesIO(path) if is_content else path.open("rb") as file:
        kind = kind_of(file.read(HEAD_BYTES), "" if is_content else path.name)
        file.seek(0)
        try:
            with _opened(file, kind) as image:
                _check_shape(image.size, min_side, max_aspect)
                if wanted_side and isinstance(image, JpegImagePlugin.JpegImageFile):
                    image.draft(None, (wanted_side, wanted_side))
                frame_note = FIRST_FRAME if _has_more_frames(image) else None
                scale_note = SMALLER if _shrunk(image, max_pixels) else None
                image.load()
                upright, *colour_notes = _upright_rgb(image, kind)
                return Decoded(upright, tuple(filter(None, (frame_note, scale_note, *colour_notes))))
        except UnusableError:
            raise
        except Image.DecompressionBombError as error:
            raise UnusableError(TOO_LARGE) from error
        except Exception as error:  # damaged files make PIL's decoders raise anything
            # UnidentifiedImageError names our temporary file, which means nothing to the user.
            detail = "" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise UnusableError(BROKEN, detail) from error


def is_one_colour(image: Image.Image) -> bool:
    """Whether an RGB image has one colour only, apart from noise of compression."""
    return all(high - low <= FLAT for low, high in image.getextrema())


def _opened(file: BinaryIO, kind: str) -> Image.Image:
    if kind == "JPEG":  # Image.open refuses over 179 megapixels, but we may decode at a smaller scale
        return JpegImagePlugin.jpeg_factory(file)
    if kind == "HEIF":
        return _HeicFile(file)
    if kind == "ICO":  # Image.open decodes before its size can be checked
        return IcoImagePlugin.IcoFile(file).frame(0)  # the largest
    image = Image.open(file, formats=[kind])
    if kind == "TIFF" and DNG_VERSION in image.tag_v2:
        raise UnusableError(CAMERA_RAW)
    return image


class _HeicFile(ImageFile.ImageFile):
    """The main picture of a HEIC file, upright, decoded when it is loaded.

    pi_heif's PIL plugin (1.4.0) reads all metadata too, and damaged metadata crashes the process.
    """

    format = "HEIF"
    format_description = "HEIC picture"

    def _open(self) -> None:
        to_8_bits, bgr, tight_rows, to_16_bits, decoder, without_limits = True, False, True, True, "", False
        pictures = _pi_heif.load_file(
            self.fp.read(), HEIC_THREADS, to_8_bits, bgr, tight_rows, to_16_bits, decoder, without_limits
        )
        pictures = [picture for picture in pictures if picture is not None]
        self._picture = next((picture for picture in pictures if picture.primary), pictures[0])
        self.is_animated = len(pictures) > 1
        self._size, self._mode = self._picture.size_mode
        profile = self._picture.color_profile
        if profile.get("type") in ("rICC", "prof"):
            self.info["icc_profile"] = profile["data"]

    def load(self) -> Image.core.PixelAccess | None:
        if self._picture is not None:
            data = self._picture.data
            self._size, self._mode = self._picture.size_mode
            self.load_prepare()
            self.frombytes(data, "raw", (self.mode, self._picture.stride))
            self._picture = None
        return super().load()


def _silence_pillow() -> None:
    """Silences Pillow's warnings and log about odd files, which become an UnusableError or do not matter."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # only a later frame is damaged
        return True


def _check_shape(size: tuple[int, int], min_side: int, max_aspect: float) -> None:
    shown = f"{size[0]} x {size[1]}"
    if min(size) < min_side:
        raise UnusableError(TOO_SMALL, f"{shown}; {min_side} is the least side")
    if max(size) > max_aspect * min(size):
        raise UnusableError(TOO_THIN, f"{shown}; the longer side may be {max_aspect:g} times the shorter")


def _shrunk(image: Image.Image, max_pixels: int) -> bool:
    """Reduces a JPEG to at most `max_pixels`, and returns whether it had to. UnusableError if that is impossible."""
    width, height = image.size
    if width * height <= max_pixels:
        return False
    # A progressive JPEG is held at full size while it is decoded, with two bytes a channel.
    held_whole = image.info.get("progressive") and width * height > 2 * max_pixels
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not held_whole:
        for scale in JPEG_SCALES:
            if -(-width // scale) * -(-height // scale) <= max_pixels:
                image.draft(None, (width // scale, height // scale))
                return True
    raise UnusableError(TOO_LARGE, f"{width} x {height}; {max_pixels:,} is the most in all: make it smaller")


def _upright_rgb(image: Image.Image, kind: str) -> tuple[Image.Image, str | None, str | None]:
    """The picture as upright RGB, and notes on its colour profile and its background."""
    with contextlib.suppress(Exception):  # the picture is usable without its EXIF
        ImageOps.exif_transpose(image, in_place=True)
    colours, profile_note = in_srgb(_plain_mode(image, kind), image.info.get("icc_profile"))
    background_note = None
    if colours.mode == "RGBA":
        colours, background_note = on_background(colours)
    if colours is image:
        colours = image.copy()  # the file will be closed
    return colours, profile_note, background_note


def _plain_mode(image: Image.Image, kind: str) -> Image.Image:
    """The picture in mode L, LA, RGB, RGBA, CMYK or LAB, with 8 bits a channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):  # PIL's modes for 16 bits
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        return _from_unit_range(image)
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_unit_range(image: Image.Image) -> Image.Image:
    """8-bit grey of float grey from 0 to 1, as scientific programs write it. UnusableError for other 32-bit pixels."""
    levels = np.asarray(image)
    if image.mode != "F" or not (levels.min() >= 0 and levels.max() <= 1):  # neither holds where one is NaN
        raise UnusableError(UNKNOWN_RANGE)
    return image.point(lambda level: level * 255 + 0.5).convert("L")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """8-bit grey of 16-bit grey. PIL would clip it at 255 of 65535."""
    grey = np.minimum(np.asarray(image), 65407)  # (H, W); so that the sum fits into 16 bits
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
