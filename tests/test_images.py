"""images.py: conversion, normalisation and saving."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clip.clip import _transform
from PIL import Image

from clip_gen.images import CLIP_STD, contact_sheet, for_clip, save_image, to_pil, to_tensor


def photo(side: int, seed: int = 0) -> Image.Image:
    """A picture with coarse and fine detail, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return Image.fromarray((40 + np.asarray(coarse) * 0.6 + rng.integers(0, 20, (side, side, 3))).astype(np.uint8))


def test_every_grey_level_survives_conversion_to_a_tensor_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    images = to_tensor([levels])
    assert images.shape == (1, 3, 16, 16)
    assert images.min() == -1
    assert images.max() == 1
    assert np.array_equal(np.asarray(to_pil(images)[0]), levels)


def test_channels_keep_their_order() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 10))
    assert to_pil(to_tensor([red]))[0].getpixel((0, 0)) == (255, 0, 10)


def test_values_out_of_range_are_clamped() -> None:
    picture = to_pil(torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1))[0]
    assert picture.getpixel((0, 0)) == (0, 255, 128)


def test_preprocessing_equals_openais() -> None:
    picture = photo(256)
    ours = for_clip(to_tensor([picture]), 224)[0]
    theirs = _transform(224)(picture)
    # PIL rounds to whole grey levels twice, after each direction; ours does not round at all.
    levels = (ours - theirs).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert levels.max() < 1.2
    assert levels.mean() < 0.4


def test_white_and_black_are_normalised_as_clip_expects() -> None:
    white = for_clip(torch.ones(1, 3, 8, 8), 8)[0, :, 0, 0]
    black = for_clip(-torch.ones(1, 3, 8, 8), 8)[0, :, 0, 0]
    assert torch.allclose(white, torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-4)
    assert torch.allclose(black, torch.tensor([-1.7923, -1.7521, -1.4802]), atol=1e-4)


@pytest.mark.parametrize("output_format", ["png", "webp", "jpg"])
def test_a_saved_file_opens_in_its_format_at_its_size(tmp_path: Path, output_format: str) -> None:
    path = tmp_path / f"out.{output_format}"
    save_image(photo(20), path, output_format)
    with Image.open(path) as picture:
        assert picture.format == {"jpg": "JPEG"}.get(output_format, output_format.upper())
        assert picture.size == (20, 20)
    assert path.stat().st_mode & 0o044


def test_metadata_in_any_script_is_saved(tmp_path: Path) -> None:
    metadata = {"prompt": "ein roter Kreis, 赤い円", "seed": 7}
    save_image(photo(8), tmp_path / "a.png", "png", metadata=metadata)
    assert Image.open(tmp_path / "a.png").text == {"prompt": "ein roter Kreis, 赤い円", "seed": "7"}
    for output_format in ("webp", "jpg"):
        path = tmp_path / f"a.{output_format}"
        save_image(photo(8), path, output_format, metadata=metadata)
        assert json.loads(Image.open(path).getexif()[0x010E]) == metadata


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (7, 3, 3)])
def test_a_contact_sheet_has_all_pictures_in_rows(count: int, columns: int, rows: int) -> None:
    sheet = contact_sheet([Image.new("RGB", (8, 6), (i, 0, 0)) for i in range(count)])
    assert sheet.size == (12 * columns + 4, 10 * rows + 4)
    for i in range(count):
        left, top = 4 + 12 * (i % columns), 4 + 10 * (i // columns)
        assert sheet.crop((left, top, left + 8, top + 6)).getcolors() == [(48, (i, 0, 0))]
    assert sheet.getpixel((0, 0)) == (255, 255, 255)


def test_lower_quality_gives_smaller_files(tmp_path: Path) -> None:
    for output_format in ("webp", "jpg"):
        sizes = []
        for quality in (5, 95):
            path = tmp_path / f"{quality}.{output_format}"
            save_image(photo(64), path, output_format, quality)
            sizes.append(path.stat().st_size)
        assert sizes[0] < sizes[1] / 2


def psnr(picture: Image.Image, path: Path) -> float:
    error = np.asarray(Image.open(path).convert("RGB"), np.float64) - np.asarray(picture, np.float64)
    return 10 * np.log10(255**2 / (error**2).mean()) if error.any() else np.inf


def test_jpegs_keep_colour_resolution_from_quality_90_and_webp_is_lossless_at_100(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    picture, path = Image.fromarray(pixels), tmp_path / "a"
    decibels = {}
    for output_format, quality in (("jpg", 89), ("jpg", 90), ("jpg", 100), ("webp", 99), ("webp", 100)):
        save_image(picture, path, output_format, quality)
        decibels[output_format, quality] = psnr(picture, path)
    assert decibels["jpg", 89] < 20 < 28 < decibels["jpg", 90] < 45 < decibels["jpg", 100]
    assert decibels["webp", 99] < 50
    assert decibels["webp", 100] == np.inf


@pytest.mark.parametrize("output_format", ["png", "webp", "jpg"])
def test_without_metadata_a_file_has_no_text(tmp_path: Path, output_format: str) -> None:
    save_image(photo(8), tmp_path / "a", output_format)
    with Image.open(tmp_path / "a") as picture:
        assert dict(picture.getexif()) == {}
        assert getattr(picture, "text", {}) == {}


@pytest.mark.parametrize("quality", [101, -1, "90", 90.5, True, None])
def test_a_quality_out_of_range_or_of_another_type_is_refused(tmp_path: Path, quality: object) -> None:
    with pytest.raises(ValueError, match=f"output_quality is {quality!r}; give a whole number, 0 to 100"):
        save_image(photo(8), tmp_path / "out.jpg", "jpg", quality)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused_without_leftovers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'"gif".*png, webp, jpg'):
        save_image(photo(8), tmp_path / "out.gif", "gif")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "out.jpg"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="RGBA"):
        save_image(Image.new("RGBA", (4, 4)), path, "jpg")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
