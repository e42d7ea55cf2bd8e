"""Colours of any picture file to sRGB: ICC profiles, CMYK, Lab, and a ground for what is transparent."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageStat

# Notes: what was done to a picture that is used.
CONVERTED = "colour profile converted to sRGB"
PROFILE_IGNORED = "colour profile damaged or of other channels, sRGB assumed"
ON_WHITE = "transparent, laid on white"
ON_DARK = "transparent and light, laid on dark grey"
TRANSPARENT = "fully transparent"

SAME = 2  # levels of 255 by which a profile may change a colour and still count as sRGB
PROBE_LEVELS = 17  # of each channel, to compare a profile with sRGB
PROFILES_KEPT = 16
WHITE, DARK = (255, 255, 255), (64, 64, 64)  # dark grey shows white, and black parts beside the white ones too
LEAST_CONTRAST = 64  # levels of 255 between white and the mean of what is visible on it

PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
SPACES = {"L": "GRAY", "LA": "GRAY", "RGB": "RGB ", "RGBA": "RGB ", "CMYK": "CMYK"}


def in_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """An image of mode L, LA, RGB, RGBA, CMYK or LAB as RGB, or RGBA with its alpha, and a note or None.

    `profile` is the file's ICC profile. One that is damaged, or belongs to other channels, is ignored. The image
    itself is returned where nothing has to change.
    """
    mode = "RGBA" if image.mode in ("LA", "RGBA") else "RGB"
    if not profile or image.mode not in SPACES:
        return _in_mode(image, mode), None
    try:
        space = _space(profile)
        if space == "GRAY" == SPACES[image.mode]:
            table = _grey_table(profile)
            return _looked_up(image, table).convert(mode), CONVERTED if table else None
        if image.mode != "CMYK":
            image = _in_mode(image, mode)
        if space != SPACES[image.mode]:
            return _in_mode(image, mode), PROFILE_IGNORED
        transform = _transform(profile, image.mode, mode)
        return (image, None) if transform is None else (transform.apply(image), CONVERTED)
    except PROFILE_ERRORS:
        return _in_mode(image, mode), PROFILE_IGNORED


def on_ground(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An RGBA image as RGB, and a note or None: on white, or on dark grey where what is visible is light.

    Light is a mean luma, weighted by alpha, less than LEAST_CONTRAST below white.
    """
    alpha = image.getchannel("A")
    least, most = alpha.getextrema()
    if most == 0:
        return Image.new("RGB", image.size, WHITE), TRANSPARENT
    if least == 255:
        return image.convert("RGB"), None
    weighted = ImageChops.multiply(image.convert("L"), alpha)
    luma = 255 * ImageStat.Stat(weighted).sum[0] / ImageStat.Stat(alpha).sum[0]
    ground, note = (DARK, ON_DARK) if luma > 255 - LEAST_CONTRAST else (WHITE, ON_WHITE)
    laid = Image.new("RGB", image.size, ground)
    laid.paste(image, mask=image)
    return laid, note


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _space(profile: bytes) -> str:
    return ImageCms.getOpenProfile(io.BytesIO(profile)).profile.xcolor_space


@lru_cache(PROFILES_KEPT)
def _transform(profile: bytes, mode: str, to: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None when that changes nothing that can be seen."""
    transform = _build(profile, mode, to)
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, PROBE_LEVELS).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(PROBE_LEVELS, -1, 3)
    seen = np.asarray(transform.apply(Image.fromarray(colours).convert(mode)).convert("RGB"))
    return transform if np.abs(seen.astype(int) - colours).max() > SAME else None


@lru_cache(PROFILES_KEPT)
def _grey_table(profile: bytes) -> list[int] | None:
    """sRGB's level for each of the 256 levels of grey; None when that changes nothing that can be seen."""
    levels = np.arange(256, dtype=np.uint8)
    seen = np.asarray(_build(profile, "L", "RGB").apply(Image.fromarray(levels[None])))[0, :, 1]
    return seen.tolist() if np.abs(seen.astype(int) - levels).max() > SAME else None


def _build(profile: bytes, mode: str, to: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # 256 levels need no speed, and littleCMS's shortcut is up to 9 levels off in the dark
        flags |= ImageCms.Flags.NOOPTIMIZE
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, to, intent, flags)


def _looked_up(image: Image.Image, table: list[int] | None) -> Image.Image:
    """Grey, of mode L or LA, through the table; alpha stays."""
    if table is None:
        return image
    if image.mode == "L":
        return image.point(table)
    grey, alpha = image.split()
    return Image.merge("LA", (grey.point(table), alpha))
