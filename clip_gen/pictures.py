"""Picture files of any common kind, by their content, to upright RGB.

JPEG, PNG, WebP, GIF, BMP and TIFF; the first frame of what moves. Colour profiles are not applied: CMYK and wide-gamut
pictures come out a little off.
"""

from __future__ import annotations

import ctypes
import logging
import math
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HEAD_BYTES = 32  # enough for kind_of

NO_PICTURE = "not a picture (JPEG, PNG, WebP, GIF, BMP or TIFF)"
BROKEN = "broken or cut off"
UNKNOWN_RANGE = "32-bit pixels, whose black and white are not known"
TOO_SMALL = "too few pixels"
TOO_LARGE = "too many pixels"

STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)  # "BM" alone begins many a text

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


class PictureError(ValueError):
    """A file is of no use as a picture: `reason` is one of this module's, `detail` says more or nothing."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def kind_of(head: bytes) -> str | None:
    """PIL's name of the kind of picture that a file's first HEAD_BYTES begin, None when it is none that is read."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADER_BYTES:
        return "BMP"
    return next((kind for start, kind in STARTS if head.startswith(start)), None)


def load_picture(path: Path, least_side: int = 1, most_pixels: float = math.inf) -> Image.Image:
    """The picture as RGB: turned as its EXIF says, alpha laid on white, 16-bit grey scaled to 8.

    Raises PictureError when it cannot be, before decoding when it is under `least_side` pixels wide or high or has
    more than `most_pixels` (PIL itself takes no more than 179 million); OSError when there is no file.
    """
    with path.open("rb") as file:
        kind = kind_of(file.read(HEAD_BYTES))
        if kind is None:
            raise PictureError(NO_PICTURE)
        file.seek(0)
        try:
            with _quiet, Image.open(file, formats=[kind]) as image:
                _check_size(image.size, least_side, most_pixels)
                image.load()
                return _upright(_rgb(image), _orientation(image))
        except PictureError:
            raise
        except Image.DecompressionBombError as error:
            raise PictureError(TOO_LARGE) from error
        except DECODING_ERRORS as error:
            # PIL names the file as it was opened here, which nobody who sent it knows.
            known = "" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise PictureError(BROKEN, known) from error


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


def _check_size(size: tuple[int, int], least_side: int, most_pixels: float) -> None:
    shown = f"{size[0]} x {size[1]}"
    if min(size) < least_side:
        raise PictureError(TOO_SMALL, f"{shown}; {least_side} is the least side")
    if math.prod(size) > most_pixels:
        raise PictureError(TOO_LARGE, f"{shown}; {most_pixels:,} is the most in all")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise PictureError(UNKNOWN_RANGE)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(layer, mask=layer)
    return on_white


def _from_16_bits(image: Image.Image) -> Image.Image:
    """PIL's own conversion would clip grey at 255 of 65535."""
    grey = np.asarray(image)  # (H, W)
    scaled = np.empty(grey.shape, np.uint8)
    for row, line in enumerate(grey):  # one at a time: a picture may be large
        scaled[row] = (line.astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled).convert("RGB")


def _orientation(image: Image.Image) -> object:
    """As its EXIF has it, after loading: PIL turns a TIFF by itself and then forgets how."""
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except DECODING_ERRORS:  # broken EXIF is no reason to lose a picture
        return None


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    return image.transpose(TURNED_BACK[orientation]) if orientation in TURNED_BACK else image
