"""pictures.py: files of any kind to upright RGB."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from clip_gen.pictures import BROKEN, NO_PICTURE, TOO_LARGE, TOO_SMALL, PictureError, load_picture

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
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_kinds_come_back_bit_for_bit_whatever_the_name(tmp_path: Path, kind: str, options: dict) -> None:
    path = saved(tmp_path / "picture.txt", Image.fromarray(PIXELS), kind, **options)
    assert np.array_equal(pixels_of(path), PIXELS)


def test_a_jpeg_comes_back_nearly(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(SMOOTH), "JPEG", quality=95, subsampling=0)
    assert np.abs(pixels_of(path).astype(int) - SMOOTH).mean() < 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_a_moving_picture_the_first_frame_is_read(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = saved(tmp_path / "a", frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels_of(path) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_how_a_picture_is_held(tmp_path: Path, kind: str, orientation: int) -> None:
    held = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
    held |= {6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2), 8: np.rot90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a", Image.fromarray(SMOOTH), kind, exif=exif)
    assert np.abs(pixels_of(path).astype(int) - held[orientation](SMOOTH)).mean() < 3


def test_broken_exif_loses_no_picture_and_says_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = saved(tmp_path / "a", Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert pixels_of(path).shape == SMOOTH.shape
    assert not recwarn


def test_a_palette_is_looked_up_and_what_is_transparent_in_it_is_white(tmp_path: Path) -> None:
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


def test_big_endian_16_bit_grey_too(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 600).round().astype(">u2").reshape(20, 30)
    seen = pixels_of(saved(tmp_path / "a", Image.frombytes("I;16B", (30, 20), grey.tobytes()), "TIFF"))
    assert np.array_equal(seen[..., 0], np.round(grey / 257).astype(np.uint8))


def test_16_bit_colour_keeps_its_high_bytes(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.reshape(20, 90).astype(np.uint16) * 257)
    (tmp_path / "a").write_bytes(png(30, 20, rows, depth=16, colour=2))
    assert np.array_equal(pixels_of(tmp_path / "a"), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(tmp_path: Path, kind: str) -> None:
    alpha = np.linspace(0, 255, 600).astype(np.uint8).reshape(20, 30, 1)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    path = saved(tmp_path / "a", Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)), kind, **options)
    share = alpha / 255
    assert np.abs(pixels_of(path) - (PIXELS * share + 255 * (1 - share))).max() <= 0.51


def test_alpha_of_grey_and_a_transparent_colour_are_white_too(tmp_path: Path) -> None:
    clear = Image.merge("LA", [Image.new("L", (20, 20), 9), Image.new("L", (20, 20), 0)])
    assert (pixels_of(saved(tmp_path / "a", clear, "PNG")) == 255).all()
    key = saved(tmp_path / "b", Image.new("RGB", (20, 20), "red"), "PNG", transparency=(255, 0, 0))
    assert (pixels_of(key) == 255).all()


def test_cmyk_is_turned_to_rgb(tmp_path: Path) -> None:
    for kind in ("JPEG", "TIFF"):
        seen = pixels_of(saved(tmp_path / "a", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), kind))
        assert np.abs(seen.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("picture", [Image.new("F", (20, 20)), Image.new("I", (20, 20))], ids=["float", "int32"])
def test_pixels_without_a_known_range_are_refused(tmp_path: Path, picture: Image.Image) -> None:
    with pytest.raises(PictureError, match="32-bit"):
        load_picture(saved(tmp_path / "a", picture, "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_picture_cut_off_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    data = saved(tmp_path / "a", Image.fromarray(PIXELS), kind).read_bytes()
    (tmp_path / "a").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PictureError) as caught:
        load_picture(tmp_path / "a")
    assert caught.value.reason == BROKEN


@pytest.mark.parametrize("content", [b"", b"hello", b"BMW is a car, and this a text about it", b"%!PS-Adobe-3.0 EPSF"])
def test_what_is_no_picture_is_called_that(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(PictureError) as caught:
        load_picture(tmp_path / "a.jpg")
    assert caught.value.reason == NO_PICTURE


def test_the_reason_does_not_show_where_the_file_lies(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100))
    with pytest.raises(PictureError) as caught:
        load_picture(tmp_path / "a.jpg")
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_file_is_no_broken_picture(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_picture(tmp_path / "a.jpg")


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG with any header one likes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_too_many_pixels_are_refused_before_decoding_without_a_word(
    tmp_path: Path, side: int, capfd: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.png").write_bytes(png(side, side, b""))  # nothing to decode: its size must be what is refused
    with pytest.raises(PictureError) as caught:
        load_picture(tmp_path / "a.png", most_pixels=2**26)
    assert caught.value.reason == TOO_LARGE
    assert not recwarn
    assert capfd.readouterr() == ("", "")


def test_too_small_is_refused_by_its_shorter_side(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Image.new("RGB", (100, 15)), "PNG")
    with pytest.raises(PictureError, match="100 x 15") as caught:
        load_picture(path, least_side=16)
    assert caught.value.reason == TOO_SMALL


def test_a_text_bomb_in_a_png_is_refused(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Comment", "a" * 10_000_000, zip=True)
    with pytest.raises(PictureError):
        load_picture(saved(tmp_path / "a", Image.fromarray(PIXELS), "PNG", pnginfo=text))


def test_reading_in_threads_leaves_the_global_settings_as_they_were(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters), warnings.showwarning, logging.getLogger("PIL").level)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_picture, [path] * 200))
    after = (Image.MAX_IMAGE_PIXELS, list(warnings.filters), warnings.showwarning, logging.getLogger("PIL").level)
    assert after == before


def test_no_damage_raises_anything_but_picture_error(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    generator = np.random.default_rng(7)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(PIXELS).save(buffer, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
        for _ in range(40):
            data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            places = generator.integers(4, len(data) if generator.random() < 0.5 else 200, 6)
            data[places] = generator.integers(0, 256, 6)
            (tmp_path / "a").write_bytes(data.tobytes())
            with contextlib.suppress(PictureError):
                load_picture(tmp_path / "a", most_pixels=10_000)
    assert capfd.readouterr() == ("", "")
