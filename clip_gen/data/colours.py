"""Colours of any picture file to sRGB: ICC profiles, CMYK, Lab, and a background for transparent pictures."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageStat

# Notes on how a picture was converted.
CONVERTED = "colour profile converted to sRGB"
PROFILE_IGNORED = "colour profile damaged or of other channels, sRGB assumed"
ON_WHITE = "transparent, laid on white"
ON_DARK = "transparent and light, laid on dark grey"
TRANSPARENT = "fully transparent"

MAX_INVISIBLE = 2  # levels of 255; a profile that changes colours by no more counts as sRGB
PROBE_LEVELS = 17  # of each channel, at which a profile is compared with sRGB
PROFILES_KEPT = 16
WHITE, DARK = (255, 255, 255), (64, 64, 64)  # on dark grey both white and black are visible
MIN_CONTRAST = 64  # levels of 255 between a white background and the mean of the visible parts

SPACES = {"L": "GRAY", "LA": "GRAY", "RGB": "RGB ", "RGBA": "RGB ", "CMYK": "CMYK"}


def in_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """An image of mode L, LA, RGB, RGBA, CMYK or LAB in sRGB, as RGB or RGBA, and a note or None.

    profile: the ICC profile of the file. Returns the same image if nothing has to change.
    """
    mode = "RGBA" if image.mode in ("LA", "RGBA") else "RGB"
    if not profile or image.mode not in SPACES:
        return _in_mode(image, mode), None
    try:
        space = ImageCms.getOpenProfile(io.BytesIO(profile)).profile.xcolor_space
        if space == "GRAY" == SPACES[image.mode]:
            table = _grey_table(profile)
            if table is None:
                return image.convert(mode), None
            alpha = [] if image.mode == "L" else [*range(256)]  # alpha stays
            return image.point([*table, *alpha]).convert(mode), CONVERTED
        if image.mode != "CMYK":
            image = _in_mode(image, mode)
        if space != SPACES[image.mode]:
            return _in_mode(image, mode), PROFILE_IGNORED
        transform = _transform(profile, image.mode, mode)
        return (image, None) if transform is None else (transform.apply(image), CONVERTED)
    except Exception:  # damaged profiles make Pillow raise anything
        return _in_mode(image, mode), PROFILE_IGNORED


def on_background(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An RGBA image as RGB, and a note or None: on white, or on dark grey if the visible parts are light.

    Light: their mean luma, weighted by alpha, is less than MIN_CONTRAST below white.
    """
    alpha = image.getchannel("A")
    lowest, highest = alpha.getextrema()
    if highest == 0:
        return Image.new("RGB", image.size, WHITE), TRANSPARENT
    if lowest == 255:
        return image.convert("RGB"), None
    weighted = ImageChops.multiply(image.convert("L"), alpha)
    luma = 255 * ImageStat.Stat(weighted).sum[0] / ImageStat.Stat(alpha).sum[0]
    background, note = (DARK, ON_DARK) if luma > 255 - MIN_CONTRAST else (WHITE, ON_WHITE)
    laid = Image.new("RGB", image.size, background)
    laid.paste(image, mask=image)
    return laid, note


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


@lru_cache(PROFILES_KEPT)
def _transform(profile: bytes, mode: str, to: str) -> ImageCms.ImageCmsTransform | None:
    """Transform from the profile to sRGB; None if it makes no visible difference."""
    transform = _build(profile, mode, to)
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, PROBE_LEVELS).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(PROBE_LEVELS, -1, 3)
    seen = np.asarray(transform.apply(Image.fromarray(colours).convert(mode)).convert("RGB"))
    return transform if np.abs(seen.astype(int) - colours).max() > MAX_INVISIBLE else None


@lru_cache(PROFILES_KEPT)
def _grey_table(profile: bytes) -> list[int] | None:
    """sRGB level of each of the 256 levels of grey; None if it makes no visible difference."""
    levels = np.arange(256, dtype=np.uint8)
    seen = np.asarray(_build(profile, "L", "RGB").apply(Image.fromarray(levels[None])))[0, :, 1]
    return seen.tolist() if np.abs(seen.astype(int) - levels).max() > MAX_INVISIBLE else None


def _build(profile: bytes, mode: str, to: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # littleCMS's optimised transform is up to 9 levels off in dark greys
        flags |= ImageCms.Flags.NOOPTIMIZE
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, to, intent, flags)
