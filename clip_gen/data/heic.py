"""HEIC pictures as PIL images.

pi_heif's PIL plugin (1.4.0) reads all metadata too, and damaged metadata crashes the process.
"""

from __future__ import annotations

import _pi_heif
from PIL import Image, ImageFile

THREADS = 4  # to decode one picture


class HeicFile(ImageFile.ImageFile):
    """The main picture of a HEIC file, upright, decoded when it is loaded; not registered with PIL."""

    format = "HEIF"
    format_description = "HEIC picture"

    def _open(self) -> None:
        to_8_bits, bgr, tight_rows, to_16_bits, decoder, without_limits = True, False, True, True, "", False
        pictures = _pi_heif.load_file(
            self.fp.read(), THREADS, to_8_bits, bgr, tight_rows, to_16_bits, decoder, without_limits
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
