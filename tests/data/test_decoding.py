"""decoding.py, file_kinds.py and colours.py: files of any kind to upright RGB in sRGB."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES
from icc_profiles import (
    ADOBE_GAMMA,
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    as_srgb,
    cmyk_profile,
    grey_profile,
    rgb_profile,
    srgb_encoded,
)
from PIL import Image, ImageCms, ImageColor, PngImagePlugin, TiffImagePlugin

from clip_gen.data.colours import CONVERTED, ON_DARK, ON_WHITE, PROFILE_IGNORED, TRANSPARENT
from clip_gen.data.decoding import (
    BROKEN,
    FIRST_FRAME,
    SMALLER,
    TOO_LARGE,
    TOO_SMALL,
    TOO_THIN,
    UNKNOWN_RANGE,
    decode,
    is_one_colour,
    load_picture,
)
from clip_gen.data.file_kinds import HEAD_BYTES, NO_PICTURE, UnusableError, kind_of

HEIC = FIXTURES / "heic"
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:200:20j, 0:200:30j], 90), axis=2).astype(np.uint8)


def saved(path: Path, picture: Image.Image, kind: str, **options: object) -> Path:
    picture.save(path, kind, **options)
    return path


def pixels_of(path: Path) -> np.ndarray:
    picture = load_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})),
        *(
            ("PPM", {}),
            ("TGA", {}),
            ("TGA", {"compression": "tga_rle"}),
            ("JPEG2000", {}),
            ("ICO", {"sizes": [(30, 20)]}),
        ),
        ("JPEG2000", {"no_jp2": True}),
    ],
)
def test_lossless_formats_are_decoded_exactly_under_any_name(tmp_path: Path, kind: str, options: dict) -> None:
    path = saved(tmp_path / "picture.txt", Image.fromarray(PIXELS), kind, **options)
    assert np.array_equal(pixels_of(path), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_lossy_formats_are_decoded_closely(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(SMOOTH), kind, quality=95, subsampling="4:4:4")
    assert np.abs(pixels_of(path).astype(int) - SMOOTH).mean() < 2


def gradient() -> np.ndarray:
    """The pixels of the HEIC files, (96, 128, 3)."""
    y, x = np.mgrid[0:96, 0:128]
    return np.stack([x * 255 / 127, y * 255 / 95, np.full(x.shape, 90)], axis=2).round()


def test_heic_is_decoded_upright_and_in_srgb() -> None:
    assert np.abs(pixels_of(HEIC / "plain.heic") - gradient()).max() <= 2
    turned = decode(HEIC / "turned-p3.heic")
    assert turned.notes == (CONVERTED,)
    expected = as_srgb(np.rot90(gradient(), 3), DISPLAY_P3, None)
    assert np.abs(np.asarray(turned.image) - expected).mean() < 1
    several = decode(HEIC / "two.heic")
    assert several.notes == (FIRST_FRAME,)
    assert np.abs(np.asarray(several.image) - gradient()).mean() < 2


def test_heic_with_damaged_metadata_does_not_crash_the_process(tmp_path: Path) -> None:
    data = (HEIC / "turned-p3.heic").read_bytes()
    assert data.count(b"\0\0Exif\0") == 1  # the type of an item, which pi_heif's PIL plugin takes for UTF-8
    (tmp_path / "a.heic").write_bytes(data.replace(b"\0\0Exif\0", b"\0\0\xf7xif\0"))
    code = "import sys; from pathlib import Path; from clip_gen.data.decoding import decode; decode(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.heic")], check=True)


def test_heic_is_read_in_forked_processes() -> None:
    path = HEIC / "plain.heic"
    expected = pixels_of(path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(np.array_equal(seen, expected) for seen in pool.map(pixels_of, [path] * 4))


def test_reading_registers_no_decoder_with_pil() -> None:
    code = (
        "import sys; from pathlib import Path; from PIL import Image; import clip_gen.data.decoding; "
        "clip_gen.data.decoding.load_picture(Path(sys.argv[1])); sys.exit('HEIF' in Image.OPEN)"
    )
    subprocess.run([sys.executable, "-c", code, str(HEIC / "plain.heic")], check=True)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_used_and_noted(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = saved(tmp_path / "a", frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (np.abs(pixels_of(path).astype(int) - (255, 0, 0)) <= (2 if kind == "AVIF" else 0)).all()
    assert decode(path).notes == (FIRST_FRAME,)
    assert decode(saved(tmp_path / "b", frames[0], kind)).notes == ()


def test_damage_after_the_first_frame_loses_no_picture(tmp_path: Path) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    frames[0].save(tmp_path / "a", "GIF", save_all=True, append_images=frames[1:])
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[: len(data) * 2 // 3])
    assert pixels_of(tmp_path / "a").shape == PIXELS.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_rotated_as_exif_says(tmp_path: Path, kind: str, orientation: int) -> None:
    held = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
    held |= {6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2), 8: np.rot90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a", Image.fromarray(SMOOTH), kind, exif=exif)
    assert np.abs(pixels_of(path).astype(int) - held[orientation](SMOOTH)).mean() < 3


def test_damaged_exif_loses_no_picture_and_prints_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = saved(tmp_path / "a", Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert pixels_of(path).shape == SMOOTH.shape
    assert not recwarn


def test_palettes_are_converted_and_their_transparent_colour_is_white(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20) % 3, "L").convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)[np.asarray(picture)]
    for kind in ("PNG", "GIF", "BMP"):
        assert np.array_equal(pixels_of(saved(tmp_path / kind, picture, kind)), expected)
    for kind in ("PNG", "GIF"):
        seen = pixels_of(saved(tmp_path / kind, picture, kind, transparency=1))
        assert np.array_equal(seen, np.where(np.asarray(picture)[..., None] == 1, 255, expected))
    several = pixels_of(saved(tmp_path / "several", picture, "PNG", transparency=bytes([255, 0, 51])))
    assert set(map(tuple, several.reshape(-1, 3).tolist())) == {(255, 0, 0), (255, 255, 255), (204, 204, 255)}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "JPEG"])
def test_grey_stays_grey(tmp_path: Path, kind: str) -> None:
    grey = SMOOTH[..., 0]
    seen = pixels_of(saved(tmp_path / "a", Image.fromarray(grey), kind))
    assert np.abs(seen.astype(int) - grey[..., None]).max() <= (8 if kind == "JPEG" else 0)


def test_black_and_white_are_0_and_255(tmp_path: Path) -> None:
    seen = pixels_of(saved(tmp_path / "a", Image.fromarray(PIXELS[..., 0] > 127), "PNG"))
    assert np.array_equal(seen[..., 0], (PIXELS[..., 0] > 127) * np.uint8(255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    seen = pixels_of(saved(tmp_path / "a", Image.fromarray(grey), kind))
    assert np.array_equal(seen[..., 2], np.round(grey / 257).astype(np.uint8))


def test_big_endian_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 600).round().astype(">u2").reshape(20, 30)
    seen = pixels_of(saved(tmp_path / "a", Image.frombytes("I;16B", (30, 20), grey.tobytes()), "TIFF"))
    assert np.array_equal(seen[..., 0], np.round(grey / 257).astype(np.uint8))


def test_16_bit_colour_keeps_its_high_bytes(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.reshape(20, 90).astype(np.uint16) * 257)
    (tmp_path / "a").write_bytes(png(30, 20, rows, depth=16, colour=2))
    assert np.array_equal(pixels_of(tmp_path / "a"), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_pictures_get_a_white_background(tmp_path: Path, kind: str) -> None:
    alpha = np.linspace(0, 255, 600).astype(np.uint8).reshape(20, 30, 1)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    path = saved(tmp_path / "a", Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)), kind, **options)
    share = alpha / 255
    assert np.abs(pixels_of(path) - (PIXELS * share + 255 * (1 - share))).max() <= 0.51


def test_a_transparent_colour_and_grey_with_alpha_get_white_too(tmp_path: Path) -> None:
    half = Image.fromarray(np.where(np.arange(400).reshape(20, 20) % 20 < 10, 0, 255).astype(np.uint8))
    grey = saved(tmp_path / "a", Image.merge("LA", [Image.new("L", (20, 20), 9), half]), "PNG")
    assert set(pixels_of(grey)[0, :, 0].tolist()) == {9, 255}
    keyed = Image.new("RGB", (20, 20), "red")
    keyed.paste("blue", (0, 0, 5, 20))
    for kind, options in (("b", {"transparency": (255, 0, 0)}), ("c", {"transparency": (0, 0, 255)})):
        seen = decode(saved(tmp_path / kind, keyed, "PNG", **options))
        assert seen.notes == (ON_WHITE,)
        assert {tuple(pixel) for pixel in np.asarray(seen.image)[0].tolist()} == {
            (255, 255, 255),
            (0, 0, 255) if kind == "b" else (255, 0, 0),
        }


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_fully_transparent_picture_is_white_and_noted(tmp_path: Path, mode: str) -> None:
    """An earlier version accepted them: a training that holds one must still resume."""
    seen = decode(saved(tmp_path / "a", Image.new("RGBA", (20, 20), (200, 9, 9, 0)).convert(mode), "PNG"))
    assert seen.notes == (TRANSPARENT,)
    assert (np.asarray(seen.image) == 255).all()


@pytest.mark.parametrize(
    ("colour", "ground"),
    [
        ("white", (64, 64, 64)),
        ("#dddddd", (64, 64, 64)),
        ("yellow", (64, 64, 64)),
        ("pink", (64, 64, 64)),
        ("#bbbbbb", (255, 255, 255)),
        ("red", (255, 255, 255)),
        ("black", (255, 255, 255)),
    ],
)
def test_light_pictures_get_a_dark_background(tmp_path: Path, colour: str, ground: tuple) -> None:
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # invisible pixels are black and do not count
    picture.paste(colour, (10, 10, 20, 20))
    seen = decode(saved(tmp_path / "a", picture, "PNG"))
    assert seen.notes == (ON_DARK if ground == (64, 64, 64) else ON_WHITE,)
    assert seen.image.getpixel((0, 0)) == ground
    assert seen.image.getpixel((15, 15)) == ImageColor.getrgb(colour)


def test_opaque_alpha_needs_no_background(tmp_path: Path) -> None:
    seen = decode(saved(tmp_path / "a", Image.fromarray(PIXELS).convert("RGBA"), "PNG"))
    assert seen.notes == ()
    assert np.array_equal(np.asarray(seen.image), PIXELS)


# Colour profiles

COLOURS = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    ("primaries", "gamma"), [(ADOBE_RGB, ADOBE_GAMMA), (DISPLAY_P3, None)], ids=["Adobe RGB", "P3"]
)
def test_wide_colours_are_converted_to_srgb(tmp_path: Path, kind: str, primaries: tuple, gamma: float | None) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    path = saved(tmp_path / "a", Image.fromarray(COLOURS), kind, icc_profile=rgb_profile(primaries, gamma), **options)
    with Image.open(path) as plain:
        stored = np.asarray(plain)
    seen = decode(path)
    assert seen.notes == (CONVERTED,)
    assert np.abs(np.asarray(seen.image) - as_srgb(stored, primaries, gamma)).max() <= 2
    assert np.abs(np.asarray(seen.image).astype(int) - stored).max() > 50


def test_alpha_and_palettes_have_profiles_too(tmp_path: Path) -> None:
    profile = rgb_profile(ADOBE_RGB, ADOBE_GAMMA)
    expected = as_srgb(COLOURS, ADOBE_RGB, ADOBE_GAMMA)
    alpha = COLOURS[..., :1] // 2 + 100
    path = saved(tmp_path / "a", Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)), "PNG", icc_profile=profile)
    on_white = expected * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(pixels_of(path) - on_white).max() <= 2
    palette = Image.fromarray(COLOURS).quantize(64)
    path = saved(tmp_path / "b", palette, "PNG", icc_profile=profile)
    looked_up = as_srgb(np.asarray(palette.convert("RGB")), ADOBE_RGB, ADOBE_GAMMA)
    assert np.abs(pixels_of(path) - looked_up).max() <= 2


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_is_converted_and_stays_grey(tmp_path: Path, mode: str, gamma: float) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels)
    if mode == "LA":
        picture.putalpha(255)
    seen = decode(saved(tmp_path / "a", picture, "PNG", icc_profile=grey_profile(gamma)))
    assert seen.notes == (CONVERTED,)
    expected = 255 * srgb_encoded((levels / 255) ** gamma)
    assert np.abs(np.asarray(seen.image) - expected[..., None]).max() <= 1


def test_grey_with_a_profile_of_three_channels_is_converted(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    profile = rgb_profile(DISPLAY_P3, 1.0)
    seen = pixels_of(saved(tmp_path / "a", Image.fromarray(levels), "PNG", icc_profile=profile))
    assert np.abs(seen - 255 * srgb_encoded(levels / 255)[..., None]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_by_its_profile(tmp_path: Path, kind: str) -> None:
    profile = cmyk_profile((95, 0, -2), [(55, -37, -50), (48, 74, -3), (89, -5, 93), (16, 0, 0)])
    # Lab of the inks above, in sRGB by the published formulas, black point compensated.
    expected = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 0, 0): (216, 10, 122), (0, 0, 255, 0): (247, 224, 0)}
    for ink, colour in expected.items():
        seen = decode(saved(tmp_path / "a", Image.new("CMYK", (20, 20), ink), kind, icc_profile=profile, quality=100))
        assert seen.notes == (CONVERTED,)
        assert np.abs(np.asarray(seen.image).astype(int) - colour).max() <= 5


@pytest.mark.parametrize(
    "profile",
    [
        rgb_profile(SRGB, None),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ],
    ids=["of 1024 levels", "littleCMS"],
)
def test_pixels_in_srgb_stay_unchanged(tmp_path: Path, profile: bytes) -> None:
    for mode in ("RGB", "RGBA", "L"):
        picture = Image.fromarray(COLOURS).convert(mode)
        seen = decode(saved(tmp_path / "a", picture, "PNG", icc_profile=profile))
        assert seen.notes == ()
        assert np.array_equal(np.asarray(seen.image), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(
    "profile",
    [
        b"junk",
        rgb_profile(ADOBE_RGB, ADOBE_GAMMA)[:200],
        rgb_profile(ADOBE_RGB, ADOBE_GAMMA).replace(b"rTRC", b"xTRC"),
        grey_profile(2.2),
        cmyk_profile((95, 0, -2), [(55, -37, -50)] * 4),
    ],
    ids=["junk", "cut off", "no curve", "of grey", "of CMYK"],
)
def test_an_unusable_profile_loses_no_picture(tmp_path: Path, profile: bytes) -> None:
    seen = decode(saved(tmp_path / "a", Image.fromarray(COLOURS), "PNG", icc_profile=profile))
    assert seen.notes == (PROFILE_IGNORED,)
    assert np.array_equal(np.asarray(seen.image), COLOURS)


def test_cmyk_is_converted_to_rgb(tmp_path: Path) -> None:
    for kind in ("JPEG", "TIFF"):
        seen = pixels_of(saved(tmp_path / "a", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), kind))
        assert np.abs(seen.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    "pixels",
    [
        PIXELS[..., 0].astype(np.int32) * 1000,
        PIXELS[..., 0].astype(np.float32),
        PIXELS[..., 0].astype(np.float32) / 255 - 0.5,
        np.where(PIXELS[..., 0] > 3, PIXELS[..., 0] / 255, np.nan).astype(np.float32),
    ],
    ids=["int32", "0 to 255", "below 0", "nan"],
)
def test_pixels_without_a_known_range_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    assert reason(saved(tmp_path / "a", Image.fromarray(pixels), "TIFF")) == UNKNOWN_RANGE


def test_floating_point_from_0_to_1_and_16_bit_ppm_are_scaled(tmp_path: Path) -> None:
    grey = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    seen = pixels_of(saved(tmp_path / "a", Image.fromarray(grey), "TIFF"))
    assert np.abs(seen[..., 1] - grey * 255).max() <= 0.51
    (tmp_path / "b").write_bytes(b"P5 30 20 65535\n" + (grey * 65535).astype(">u2").tobytes())
    assert np.abs(pixels_of(tmp_path / "b")[..., 1] - grey * 255).max() <= 0.51


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "TGA", "PPM", "JPEG2000", "AVIF", "ICO", "HEIF"]
)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_truncated_picture_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    path = HEIC / "plain.heic" if kind == "HEIF" else saved(tmp_path / "a", Image.fromarray(PIXELS), kind)
    data = path.read_bytes()
    (tmp_path / "a").write_bytes(data[: int(len(data) * share)])
    assert reason(tmp_path / "a") == BROKEN


def reason(path: Path, *limits: float) -> str:
    with pytest.raises(UnusableError) as caught:
        decode(path, *limits)
    return caught.value.reason


RAW, VIDEO = "camera raw: export as JPEG", "a video: export pictures of it"
PACKED = "an archive inside: unpack it first"
VECTOR, PROGRAM = "a vector drawing: export as PNG", "a file of a drawing program: export as PNG"
WEB_PAGE = "a web page: download the picture itself"


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (b"", "a.jpg", "an empty file"),
        (b"hello", "a.jpg", "a text file"),
        ("Grüße".encode("latin-1"), "a.txt", "a text file"),
        ("Grüße".encode("utf-16"), "a.txt", "a text file"),
        (b"BMW is a car, and this a text about it", "a.bmp", "a text file"),
        (b"P3 is a text here", "a.ppm", "a text file"),
        (b"GIF is a format", "a.gif", "a text file"),
        (b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>", "a.xmp", "a text file"),
        (b"\xef\xbb\xbf \r\n<!DOCTYPE html>", "a.jpg", WEB_PAGE),
        (b"<!-- saved from url --><HTML>", "a.jpg", WEB_PAGE),
        (b"<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC>", "a.png", WEB_PAGE),
        (b"<html><body><svg/></body></html>", "a.png", WEB_PAGE),
        (b"<?xml version='1.0'?><!-- by a program --><!DOCTYPE svg><svg/>", "a.jpg", VECTOR),
        (b"\x1f\x8b packed", "a.svgz", VECTOR),
        (b"%!PS-Adobe-3.0 EPSF", "a.jpg", VECTOR),
        (b"%PDF-1.7", "a.jpg", "a PDF: export its pages as pictures"),
        (b"II*\0\x10\0\0\0CR\2\0", "a.jpg", RAW),
        (b"II*\0\x08\0\0\0", "a.NEF", RAW),
        (b"MM\0*\0\0\0\x08", "photos\\b.Dng", RAW),
        (b"FUJIFILMCCD-RAW 0201", "a.jpg", RAW),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "a.jpg", RAW),
        (bytes(range(256)), "a.arw", RAW),
        (b"\0\0\0\x14ftypqt  ", "IMG_1.heic", VIDEO),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isom", "a", VIDEO),
        (b"RIFF\0\0\0\0AVI LIST", "a", VIDEO),
        (b"RIFF\0\0\0\0WAVEfmt ", "a", NO_PICTURE),
        (bytes(range(256)), "a.mpg", VIDEO),
        (b"8BPS\0\1", "a.jpg", PROGRAM),
        (b"PK\3\4", "a.kra", PROGRAM),
        (b"PK\3\4", "a.jpg", PACKED),
        (b"7z\xbc\xaf\x27\x1c", "a.7z", PACKED),
        (b"\xff\x0a\xfa\x7f", "a.jxl", "JPEG XL: export as JPEG or PNG"),
        (bytes(range(256)), "a.jpg", NO_PICTURE),
    ],
)
def test_other_files_are_refused_with_what_they_are(content: bytes, name: str, expected: str) -> None:
    with pytest.raises(UnusableError) as caught:
        kind_of(content[:HEAD_BYTES], name)
    assert caught.value.reason == expected


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"heic\0\0\0\0mif1heic", "HEIF"),
        (b"mif1\0\0\0\0mif1heic", "HEIF"),
        (b"mif1\0\0\0\0mif1avif", "AVIF"),
        (b"avif\0\0\0\0mif1avif", "AVIF"),
    ],
)
def test_heic_and_avif_are_distinguished_by_their_brands(brands: bytes, kind: str) -> None:
    box = (len(brands) + 8).to_bytes(4, "big") + b"ftyp" + brands
    assert kind_of(box + b"\0\0\0\x08metaavifheic") == kind


def test_a_dng_that_pil_reads_as_its_thumbnail_is_camera_raw(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"
    assert reason(saved(tmp_path / "a.tif", Image.fromarray(PIXELS), "TIFF", tiffinfo=tags)) == RAW


def test_the_reason_does_not_show_the_path_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100))
    with pytest.raises(UnusableError) as caught:
        load_picture(tmp_path / "a.jpg")
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_file_is_not_reported_as_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_picture(tmp_path / "a.jpg")


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG with any width and height in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_too_many_pixels_are_refused_before_decoding_without_output(
    tmp_path: Path, side: int, capfd: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.png").write_bytes(png(side, side, b""))  # nothing to decode: only its size can be refused
    with pytest.raises(UnusableError) as caught:
        load_picture(tmp_path / "a.png")
    assert caught.value.reason == TOO_LARGE
    assert not recwarn
    assert capfd.readouterr() == ("", "")


def test_too_small_is_refused_by_its_shorter_side(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Image.new("RGB", (100, 15)), "PNG")
    with pytest.raises(UnusableError, match="100 x 15") as caught:
        decode(path, min_side=16)
    assert caught.value.reason == TOO_SMALL


def test_too_thin_is_refused_by_its_sides(tmp_path: Path) -> None:
    for size, thin in (((320, 20), False), ((20, 320), False), ((321, 20), True), ((20, 321), True)):
        path = saved(tmp_path / "a", Image.new("RGB", size), "PNG")
        if thin:
            assert reason(path, 16, 16.0) == TOO_THIN
        else:
            assert decode(path, 16, 16.0).image.size == size


def test_a_huge_jpeg_is_decoded_at_a_smaller_scale_in_little_memory(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)
    picture = Image.fromarray(levels).resize((12_000, 9_000), Image.Resampling.BOX)
    path = saved(tmp_path / "a", picture, "JPEG", quality=60)
    code = (
        "import resource, sys; from pathlib import Path; from clip_gen.data.decoding import decode; "
        "memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "before = memory(); seen = decode(Path(sys.argv[1])); print(memory() - before, *seen.image.size, *seen.notes)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    memory, width, height, notes = run.stdout.split(maxsplit=3)
    assert (int(width), int(height), notes.strip()) == (6000, 4500, SMALLER)
    assert int(memory) * 1024 < 2 * 6000 * 4500 * 4  # the picture and a copy; whole it would be 540 MB


def test_jpegs_are_shrunk_no_further_than_needed(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    picture = Image.fromarray(levels).resize((240, 160), Image.Resampling.BOX)
    path = saved(tmp_path / "a", picture, "JPEG", quality=95)
    for most, scale in ((240 * 160, 1), (240 * 160 - 1, 2), (120 * 80, 2), (60 * 40, 4), (30 * 20, 8)):
        seen = decode(path, max_pixels=most).image
        assert seen.size == (240 // scale, 160 // scale)
        middles = np.asarray(seen.resize((6, 4), Image.Resampling.BOX)).astype(int)
        assert np.abs(middles - levels).mean() < 6
    assert reason(path, 1, 16, 30 * 20 - 1) == TOO_LARGE
    progressive = saved(tmp_path / "b", picture, "JPEG", progressive=True)  # whose memory grows with its full size
    assert decode(progressive, max_pixels=120 * 160).image.size == (120, 80)
    assert reason(progressive, 1, 16, 120 * 160 - 1) == TOO_LARGE


def test_an_icon_is_used_at_its_largest_size_within_the_limits(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).resize((64, 64)).save(tmp_path / "a", "ICO", sizes=[(16, 16), (48, 48), (32, 32)])
    assert load_picture(tmp_path / "a").size == (48, 48)
    bomb = png(12_000, 12_000, b"")
    (tmp_path / "b").write_bytes(struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(bomb), 22) + bomb)
    assert reason(tmp_path / "b") == TOO_LARGE


def test_one_colour_is_recognised_despite_compression(tmp_path: Path) -> None:
    for colour in ((128, 128, 128), (200, 30, 77)):
        picture = Image.new("RGB", (300, 300), colour)
        for kind in ("PNG", "JPEG", "WEBP"):
            assert is_one_colour(load_picture(saved(tmp_path / "a", picture, kind)))
        picture.paste((255, 255, 255), (100, 100, 103, 103))
        assert not is_one_colour(load_picture(saved(tmp_path / "a", picture, "PNG")))


def test_a_text_bomb_in_a_png_is_refused(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Comment", "a" * 10_000_000, zip=True)
    with pytest.raises(UnusableError):
        load_picture(saved(tmp_path / "a", Image.fromarray(PIXELS), "PNG", pnginfo=text))


def test_reading_in_threads_silences_pillow_and_nothing_else(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = saved(tmp_path / "a", Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    before = (Image.MAX_IMAGE_PIXELS, warnings.showwarning, logging.getLogger().level)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_picture, [path] * 200))
    assert not recwarn.list
    assert (Image.MAX_IMAGE_PIXELS, warnings.showwarning, logging.getLogger().level) == before
    warnings.warn("of another module", stacklevel=1)
    assert len(recwarn.list) == 1


def test_damaged_files_raise_unusable_error_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    generator = np.random.default_rng(7)
    profile = rgb_profile(ADOBE_RGB, ADOBE_GAMMA)
    heic = (HEIC / "turned-p3.heic").read_bytes()
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF", "HEIF"):
        buffer = io.BytesIO(heic)
        if kind != "HEIF":
            options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
            Image.fromarray(PIXELS).save(buffer := io.BytesIO(), kind, icc_profile=profile, **options)
        for _ in range(40):
            data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            places = generator.integers(4, len(data) if generator.random() < 0.5 else 200, 6)
            data[places] = generator.integers(0, 256, 6)
            (tmp_path / "a").write_bytes(data.tobytes())
            with contextlib.suppress(UnusableError):
                decode(tmp_path / "a", max_pixels=10_000)
    assert capsys.readouterr() == ("", "")
