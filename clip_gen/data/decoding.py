"""Picture files of any common kind, by their content, to upright RGB in sRGB; the first frame of animations."""

from __future__ import annotations

import ctypes
import logging
import math
import struct
import threading
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import IcoImagePlugin, Image, JpegImagePlugin

from clip_gen.data.colours import in_srgb, on_ground
from clip_gen.data.file_kinds import CAMERA_RAW, HEAD_BYTES, PictureError, kind_of
from clip_gen.data.heic import HeicFile

BROKEN = "cut off or damaged"
ONE_COLOUR = "one colour all over"
UNKNOWN_RANGE = "32-bit pixels, whose black and white are not known: save with 8 or 16 bits"
TOO_SMALL = "too small"
TOO_THIN = "too thin"
TOO_LARGE = "too many pixels"

# Notes: what was done to a picture that is used.
FIRST_FRAME = "several frames or pages, the first used"
SMALLER = "very large JPEG, read at a smaller scale"

MOST_PIXELS = 2**26  # of one picture; half a GB while it is decoded, WebP 1 GB and JPEG 2000 1.2
JPEG_SCALES = (1, 2, 4, 8)  # at which libjpeg decodes without holding the whole picture
FLAT = 8  # levels of 255 by which a picture of one colour may vary

DNG_VERSION = 50706  # a TIFF with this tag is camera raw
EXIF_ORIENTATION = 0x0112
TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What PIL's decoders raise on bytes that are not as they should be.
DECODING_ERRORS = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
)


@dataclass(frozen=True)
class Decoded:
    """A picture as RGB, as it is trained on, and notes on what was done to make it so."""

    image: Image.Image
    notes: tuple[str, ...]


def load_picture(path: Path, wanted_side: int | None = None) -> Image.Image:
    """The picture as RGB; see `decode`."""
    return decode(path, wanted_side=wanted_side).image


def decode(
    path: Path,
    least_side: int = 1,
    most_aspect: float = math.inf,
    most_pixels: int = MOST_PIXELS,
    wanted_side: int | None = None,
) -> Decoded:
    """The picture as RGB: in sRGB, turned as its EXIF says, transparency laid on a ground, 16-bit grey scaled to 8.

    A JPEG of more than `most_pixels` is decoded at half, a quarter or an eighth of its size, and so is one that stays
    at least `wanted_side` pixels wide and high. PictureError when the file is no picture of use, before decoding when
    it is under `least_side` pixels wide or high, or longer than `most_aspect` times its shorter side, or has more than
    `most_pixels`; OSError when there is no file.
    """
    with path.open("rb") as file:
        kind = kind_of(file.read(HEAD_BYTES), path.name)
        file.seek(0)
        try:
            with _quiet, _opened(file, kind) as image:
                _check_shape(image.size, least_side, most_aspect)
                if wanted_side and isinstance(image, JpegImagePlugin.JpegImageFile):
                    image.draft(None, (wanted_side, wanted_side))
                frames = [FIRST_FRAME] if _has_more_frames(image) else []
                scaled = [SMALLER] if _shrunk(image, most_pixels) else []
                image.load()
                upright, notes = _upright_rgb(image, kind)
                return Decoded(upright, (*frames, *scaled, *notes))
        except PictureError:
            raise
        except Image.DecompressionBombError as error:
            raise PictureError(TOO_LARGE) from error
        except DECODING_ERRORS as error:
            # PIL names the file as it was opened here, which nobody who sent it knows.
            known = "" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise PictureError(BROKEN, known) from error


def is_one_colour(image: Image.Image) -> bool:
    """Whether an RGB image shows nothing but one colour, but for what compression adds."""
    return all(most - least <= FLAT for least, most in image.getextrema())


def _opened(file: BinaryIO, kind: str) -> Image.Image:
    if kind == "JPEG":  # Image.open refuses all above 179 megapixels, which can be decoded at a smaller scale
        return JpegImagePlugin.jpeg_factory(file)
    if kind == "HEIF":
        return HeicFile(file)
    if kind == "ICO":  # Image.open decodes before its size can be checked
        return IcoImagePlugin.IcoFile(file).frame(0)  # the largest
    image = Image.open(file, formats=[kind])
    if kind == "TIFF" and DNG_VERSION in image.tag_v2:
        raise PictureError(CAMERA_RAW)
    return image


class _Quiet:
    """Keeps what PIL and its libtiff say about odd files off the terminal.

    All of these settings are the process's, so of several threads the first in saves them and the last out restores.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._warnings = warnings.catch_warnings()
                self._warnings.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._level = logging.getLogger("PIL").level
                logging.getLogger("PIL").setLevel(logging.CRITICAL)
                self._handler = _handle_tiff_errors(None)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._warnings.__exit__()
                logging.getLogger("PIL").setLevel(self._level)
                _handle_tiff_errors(self._handler)


_quiet = _Quiet()


def _handle_tiff_errors(handler: int | None) -> int | None:
    """Sets who writes libtiff's errors, by a C pointer, None for nobody; the one before.

    PIL raises them too, but leaves libtiff's own handler in place, which writes to the terminal.
    """
    library = ctypes.CDLL(Image.core.__file__)  # loaded already, with the libtiff that PIL brings
    set_handler = getattr(library, "TIFFSetErrorHandler", None)
    if set_handler is None:  # a PIL without libtiff, or with one built in
        return None
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    return set_handler(handler)


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except DECODING_ERRORS:  # damage after the first frame
        return True


def _check_shape(size: tuple[int, int], least_side: int, most_aspect: float) -> None:
    shown = f"{size[0]} x {size[1]}"
    if min(size) < least_side:
        raise PictureError(TOO_SMALL, f"{shown}; {least_side} is the least side")
    if max(size) > most_aspect * min(size):
        raise PictureError(TOO_THIN, f"{shown}; the longer side may be {most_aspect:g} times the shorter")


def _shrunk(image: Image.Image, most_pixels: int) -> bool:
    """Whether it had to be made smaller to have no more than `most_pixels`; PictureError when it cannot be."""
    width, height = image.size
    if width * height <= most_pixels:
        return False
    # A progressive JPEG is held whole while it is decoded, two bytes a channel.
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not (
        image.info.get("progressive") and width * height > 2 * most_pixels
    ):
        for scale in JPEG_SCALES:
            if -(-width // scale) * -(-height // scale) <= most_pixels:
                image.draft(None, (width // scale, height // scale))
                return True
    raise PictureError(TOO_LARGE, f"{width} x {height}; {most_pixels:,} is the most in all: make it smaller")


def _upright_rgb(image: Image.Image, kind: str) -> tuple[Image.Image, list[str]]:
    orientation = _orientation(image)
    colours, profile_note = in_srgb(_plain_mode(image, kind), image.info.get("icc_profile"))
    ground_note = None
    if colours.mode == "RGBA":
        colours, ground_note = on_ground(colours)
    if colours is image:
        colours = image.copy()  # independent of the file
    return _upright(colours, orientation), [note for note in (profile_note, ground_note) if note]


def _plain_mode(image: Image.Image, kind: str) -> Image.Image:
    """As L, LA, RGB, RGBA, CMYK or LAB, of 8 bits a channel."""
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode == "I" and kind == "PPM":  # PIL's mode for its 16 bits
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        return _from_unit_range(image)
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_unit_range(image: Image.Image) -> Image.Image:
    """Grey in floating point from 0 to 1, as programs that calculate write it; PictureError for any other 32 bits."""
    levels = np.asarray(image)
    if image.mode != "F" or not (levels.min() >= 0 and levels.max() <= 1):  # neither holds where one is NaN
        raise PictureError(UNKNOWN_RANGE)
    return image.point(lambda level: level * 255 + 0.5).convert("L")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """PIL's own conversion would clip grey at 255 of 65535."""
    grey = np.asarray(image)  # (H, W)
    scaled = np.empty(grey.shape, np.uint8)
    for row, line in enumerate(grey):  # one at a time: a picture may be large
        scaled[row] = (line.astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled)


def _orientation(image: Image.Image) -> object:
    """As its EXIF has it, after loading: PIL turns a TIFF by itself and then forgets how."""
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except DECODING_ERRORS:  # broken EXIF is no reason to lose a picture
        return None


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    return image.transpose(TURNED_BACK[orientation]) if orientation in TURNED_BACK else image
