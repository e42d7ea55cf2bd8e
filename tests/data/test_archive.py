"""archive.py, with entries.py, zips.py, tars.py, limits.py and manifest.py: any archive to usable pictures."""

from __future__ import annotations

import errno
import io
import json
import logging
import lzma
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import inflate64
import numpy as np
import pytest
from conftest import TINY
from nasty_zip import FIRST, SECOND, TOP, encoded, write_nasty_zip
from PIL import Image

from clip_gen.data import archive as archive_module
from clip_gen.data import zips
from clip_gen.data.archive import LIMITS, unpack
from clip_gen.data.decoding import decode, load_picture
from clip_gen.data.entries import is_litter
from clip_gen.data.file_kinds import NO_PICTURE
from clip_gen.data.limits import ArchiveError, Limits
from clip_gen.data.manifest import INDEX, Pictures, shown, unpacked
from clip_gen.training.datasets import PictureFiles
from clip_gen.training.plan import TrainSettings, plan
from clip_gen.training.report import training_record, write_report

FEW = replace(LIMITS, min_pictures=1)


def picture(number: int, kind: str = "PNG", side: int = 20, **options: object) -> bytes:
    """A picture file; other numbers give other pixels."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


TEN = {f"{number}.png": picture(number) for number in range(10)}


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_deflate64_zip(path: Path, files: dict[str, bytes]) -> Path:
    """As Windows makes zips over 2 GB. zipfile stores the packed bytes, and the headers are changed afterwards."""
    packed = {}
    for name, content in files.items():
        deflater = inflate64.Deflater()
        packed[name] = deflater.deflate(content) + deflater.flush()
    data = bytearray(make_zip(path, packed, zipfile.ZIP_STORED).read_bytes())
    with zipfile.ZipFile(path) as archive:
        table = archive.start_dir
        for member in archive.infolist():
            content = files[member.filename]
            checksum, size = struct.pack("<I", zlib.crc32(content)), struct.pack("<I", len(content))
            for place in (member.header_offset + 8, table + 10):
                data[place : place + 2] = b"\x09\0"
                data[place + 6 : place + 10] = checksum
                data[place + 14 : place + 18] = size
            table += 46 + sum(struct.unpack("<HHH", data[table + 28 : table + 34]))
    path.write_bytes(data)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w", others: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    """A tar with the members `others` before the files."""
    with tarfile.open(path, mode) as tar:
        for member in others:
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "zip": make_zip,
    "stored.zip": lambda path, files: make_zip(path, files, zipfile.ZIP_STORED),
    "deflate64.zip": make_deflate64_zip,
    "tar": make_tar,
    "tar.gz": lambda path, files: make_tar(path, files, "w:gz"),
    "tar.bz2": lambda path, files: make_tar(path, files, "w:bz2"),
    "tar.xz": lambda path, files: make_tar(path, files, "w:xz"),
    "folder": make_folder,
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "work" / "pictures"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def reasons(pictures: Pictures) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in pictures.skipped}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_archive_gives_the_same_numbered_files(tmp_path: Path, out: Path, kind: str) -> None:
    pictures = unpack(MAKERS[kind](tmp_path / f"photos.{kind}", TEN), out)
    assert [path.read_bytes() for path in pictures.paths] == list(TEN.values())
    assert [path.name for path in pictures.paths] == [f"{number:06d}.png" for number in range(1, 11)]
    assert sorted(everything(out)) == [*(path.name for path in pictures.paths), "pictures.json"]
    assert pictures.skipped == []
    assert os.listdir(out.parent) == [out.name]


def test_the_content_of_an_archive_decides_its_kind_not_its_name(tmp_path: Path, out: Path) -> None:
    assert len(unpack(make_tar(tmp_path / "photos.zip", TEN, "w:xz"), out).paths) == 10


@pytest.mark.parametrize("kind", MAKERS)
def test_pictures_are_in_the_order_of_their_names(tmp_path: Path, kind: str) -> None:
    files = {"b/2.png": picture(2), "a/9.png": picture(9), "b/1.bmp": picture(1, "BMP"), "copy.png": picture(9)}
    made = []
    for name in ("one", "two"):
        made.append(unpack(MAKERS[kind](tmp_path / f"{name}.{kind}", files), tmp_path / f"out {name}", FEW))
        files = dict(reversed(files.items()))
    assert [path.name for path in made[0].paths] == ["000001.png", "000002.bmp", "000003.png"]
    assert everything(tmp_path / "out one") == everything(tmp_path / "out two")
    assert made[0].skipped == made[1].skipped


@pytest.mark.parametrize("kind", MAKERS)
def test_files_that_are_not_pictures_are_ignored_or_listed(tmp_path: Path, out: Path, kind: str) -> None:
    litter = ("__MACOSX/a/._1.png", "a/._2.png", "a/.DS_Store", "Thumbs.db", "a/desktop.ini", ".git/objects/1.png")
    listed = {
        "a/notes.txt": ("a text file", b"text"),
        "a/unknown.dat": (NO_PICTURE, bytes(range(256))),
        "a/nothing.jpg": ("an empty file", b""),
        "Thumbnails/3.png": ("a thumbnail", picture(50)),
        "a/x.THM": ("a thumbnail", picture(51)),
        "more.zip": ("an archive inside: unpack it first", b"PK\3\4" + bytes(100)),
        "more.tar": ("an archive inside: unpack it first", tarfile.TarInfo("a").tobuf()),
    }
    files = TEN | dict.fromkeys(litter, picture(60)) | {name: content for name, (_, content) in listed.items()}
    pictures = unpack(MAKERS[kind](tmp_path / f"photos.{kind}", files), out)
    assert len(pictures.paths) == 10
    assert reasons(pictures) == {name: reason for name, (reason, _) in listed.items()}


def test_equal_pixels_in_different_files_are_used_once(tmp_path: Path, out: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    files = TEN | {"copy of 3.png": picture(3), "3.bmp": picture(3, "BMP"), "noted.png": picture(3, exif=exif)}
    pictures = unpack(make_zip(tmp_path / "photos.zip", files), out)
    assert len(pictures.paths) == 10
    assert {(one.name, one.reason, one.detail) for one in pictures.skipped} == {
        (name, "a duplicate", "of 3.bmp") for name in ("copy of 3.png", "3.png", "noted.png")
    }


def test_a_different_last_pixel_or_shape_makes_another_picture(tmp_path: Path, out: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (600, 40, 3), np.uint8)
    others = pixels.copy()
    others[-1, -1, 2] += 1
    files = {}
    for name, made in (("a", pixels), ("b", others), ("c", pixels.reshape(300, 80, 3))):
        buffer = io.BytesIO()
        Image.fromarray(made).save(buffer, "PNG")
        files[name] = buffer.getvalue()
    assert len(unpack(make_zip(tmp_path / "photos.zip", files), out, FEW).paths) == 3


def test_unusable_pictures_are_listed_with_reasons(tmp_path: Path, out: Path) -> None:
    files = TEN | {
        "broken.png": picture(20)[:500],
        "icon.gif": picture(21, "GIF", side=15),
        "poster.webp": picture(22, "WEBP", side=40),
        "heavy.bmp": picture(23, "BMP", side=30),
    }
    limits = replace(LIMITS, max_pixels=39 * 40, max_file_bytes=2000)
    pictures = unpack(make_zip(tmp_path / "photos.zip", files), out, limits)
    assert reasons(pictures) == {
        "broken.png": "cut off or damaged",
        "icon.gif": "too small",
        "poster.webp": "too many pixels" if len(files["poster.webp"]) < 2000 else "too large a file",
        "heavy.bmp": "too large a file",
    }
    assert len(everything(out)) == 11


def test_the_log_and_training_json_list_used_and_skipped_files(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = TEN | {"a.txt": b"text", "b.txt": b"text", "c.png": TEN["1.png"]}
    with caplog.at_level(logging.INFO):
        pictures = unpack(make_zip(tmp_path / "photos.zip", files), out)
    assert len(caplog.messages) == 1
    assert "photos.zip: 10 usable pictures; skipped: a text file (2); a duplicate (1)" in caplog.text
    noted = json.loads(json.dumps(pictures.as_json()))
    assert noted["used"] == 10
    assert noted["skipped"][-1] == {"name": "c.png", "reason": "a duplicate", "detail": "of 1.png"}


def test_the_index_of_an_unpacked_folder_is_read_back(tmp_path: Path, out: Path) -> None:
    pictures = unpack(make_zip(tmp_path / "photos.zip", TEN | {"ä\u202e\n.txt": b"text"}), out)
    assert unpacked(out) == pictures
    assert pictures.skipped[0].name == "ä\ufffd\ufffd.txt"
    assert [load_picture(path).size for path in pictures.paths] == [(20, 20)] * 10


def test_an_index_of_an_earlier_version_has_no_notes(tmp_path: Path, out: Path) -> None:
    unpack(make_zip(tmp_path / "photos.zip", TEN), out)
    index = json.loads((out / INDEX).read_text())
    del index["notes"]
    (out / INDEX).write_text(json.dumps(index))
    assert unpacked(out).notes == {}


# A zip with everything that people upload

NASTY_LIMITS = replace(LIMITS, max_pixels=200_000)  # "huge.jpg" has 600 by 450 pixels


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pictures, dict[str, Path]]:
    """The result of unpacking the zip, and the used files by their names in it."""
    folder = tmp_path_factory.mktemp("nasty")
    source = write_nasty_zip(folder / "everything.zip", huge=(600, 450))
    pictures = unpack(source, folder / "out", NASTY_LIMITS)
    with zipfile.ZipFile(source) as archive:
        names = sorted(name for name in archive.namelist() if not is_litter(name))
    skipped = {one.name for one in pictures.skipped}
    used = [name for name in names if shown(name) not in skipped]
    assert len(names) == len(used) + len(skipped)
    return pictures, dict(zip(used, pictures.paths, strict=True))


def test_photographs_of_an_upload_are_used_once(nasty: tuple[Pictures, dict[str, Path]]) -> None:
    pictures, used = nasty
    holiday = [name for name in used if name.startswith((f"{FIRST}/", f"{SECOND}/"))]
    assert len(holiday) == 12
    copies = {one.name: one.detail for one in pictures.skipped if one.reason == "a duplicate"}
    assert copies == {f"{TOP}/copy of {i}.jpg": f"of {FIRST}/IMG {i}.jpg" for i in range(3)}
    for litter in ("__MACOSX", "Thumbs.db", ".DS_Store", "desktop.ini"):
        assert not any(litter in name for name in (*used, *reasons(pictures)))


@pytest.mark.parametrize(
    "name",
    [
        *("png-called.jpg", "no-extension", "jpeg-called.txt", "l" * 200 + ".jpg", "new\nline.jpg"),
        *("<b>bold<b>&amp;'\".jpg", "progressive.jpg", "grey.jpg", "cmyk.jpg", "lab.tif", "sixteen-bit.png"),
        *("bilevel.tif", "palette-transparent.png", "x.ppm", "x.tga", "x.jp2", "x.bmp", "x.avif", "float.tif"),
    ],
)
def test_a_picture_of_any_kind_is_used_under_any_name(nasty: tuple[Pictures, dict[str, Path]], name: str) -> None:
    seen = decode(nasty[1][f"odd/{name}"])
    assert seen.image.size == (105, 75)
    assert np.asarray(seen.image).std() > 20


@pytest.mark.parametrize(
    ("name", "size"),
    [("turned.jpg", (75, 105)), ("IMG_0001.HEIC", (128, 96)), ("x.ico", (64, 46)), ("huge.jpg", (300, 225))],
)
def test_a_picture_is_used_at_its_right_size(
    nasty: tuple[Pictures, dict[str, Path]], name: str, size: tuple[int, int]
) -> None:
    assert decode(nasty[1][f"odd/{name}"], max_pixels=NASTY_LIMITS.max_pixels).image.size == size


def test_first_frames_are_used_and_counted_once(nasty: tuple[Pictures, dict[str, Path]]) -> None:
    pictures, used = nasty
    for name in ("animated.gif", "animated.webp", "animated.png", "multi-page.tiff", "two-in-one.mpo"):
        assert "several frames or pages, the first used" in decode(used[f"odd/{name}"]).notes
    assert pictures.notes == {
        "several frames or pages, the first used": 5,
        "transparent, laid on white": 1,
        "very large JPEG, read at a smaller scale": 1,
    }
    assert pictures.as_json()["notes"] == pictures.notes
    assert "; of these: several frames or pages, the first used (5); transparent" in pictures.summary()


def test_every_other_file_is_skipped_with_a_reason(nasty: tuple[Pictures, dict[str, Path]]) -> None:
    skipped = {one.name: (one.reason, one.detail) for one in nasty[0].skipped}
    odd = {name.removeprefix("odd/"): reason for name, reason in skipped.items() if name.startswith("odd/")}
    cut_off = "cut off or damaged"
    assert odd.pop("truncated.jpg")[0] == odd.pop("truncated-early.jpg")[0] == cut_off
    assert odd == {
        "empty.jpg": ("an empty file", ""),
        "text-called.jpg": ("a text file", ""),
        "notes.txt": ("a text file", ""),
        "page-called.jpg": ("a web page: download the picture itself", ""),
        "raw.CR2": ("camera raw: export as JPEG", ""),
        "scan.pdf": ("a PDF: export its pages as pictures", ""),
        "vector.svg": ("a vector drawing: export as PNG", ""),
        "inner.zip": ("an archive inside: unpack it first", ""),
        "one-pixel.png": ("too small", "1 x 1; 16 is the least side"),
        "strip.png": ("too thin", "20000 x 50; the longer side may be 16 times the shorter"),
        "flat-grey.png": ("one colour all over", ""),
        "all-transparent.png": ("fully transparent", ""),
    }


def test_the_report_lists_notes_and_skipped_files(nasty: tuple[Pictures, dict[str, Path]], tmp_path: Path) -> None:
    settings = TrainSettings()
    record = training_record(settings, plan(settings, TINY, 20), nasty[0], 2, {}, 1.0, {"name": "tiny"})
    write_report(tmp_path / "report.html", tmp_path, record)
    page = (tmp_path / "report.html").read_text()
    for words in (
        "several frames or pages, the first used",
        "camera raw: export as JPEG",
        "a duplicate (of ",
        "strip.png",
    ):
        assert words in page
    assert "<b>bold" not in page


def test_duplicates_are_recognised_by_the_pixels_trained_on(tmp_path: Path) -> None:
    """Pictures that differ only before conversion are duplicates."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    clear = np.concatenate([pixels, np.full((60, 60, 1), 255, np.uint8)], axis=2)
    clear[:30, :, 3] = 0
    hidden = clear.copy()
    hidden[:30, :, :3] = 7
    flattened = pixels.copy()
    flattened[:30] = 255
    files = {"clear.png": clear, "hidden.png": hidden, "flat.png": flattened, "other.png": pixels}
    pictures = unpack(
        make_folder(tmp_path / "in", {name: encoded(Image.fromarray(array), "PNG") for name, array in files.items()}),
        tmp_path / "out",
        FEW,
    )
    assert reasons(pictures) == {"flat.png": "a duplicate", "hidden.png": "a duplicate"}
    trained = PictureFiles(pictures.paths, 60)
    assert np.array_equal(trained[0], flattened)
    assert np.array_equal(trained[1], pixels)


def logo(number: int, colour: tuple[int, int, int]) -> Image.Image:
    """A shape of this colour on a transparent background."""
    shape = np.random.default_rng(number).integers(0, 2, (8, 8), np.uint8) * 255
    image = Image.new("RGBA", (64, 64), (*colour, 255))
    image.putalpha(Image.fromarray(shape).resize((64, 64), Image.Resampling.BILINEAR))
    return image


@pytest.mark.parametrize("colour", [(255, 255, 255), (215, 215, 215)], ids=["white", "light grey"])
def test_light_transparent_logos_are_not_duplicates(tmp_path: Path, out: Path, colour: tuple) -> None:
    files = {f"{number}.png": encoded(logo(number, colour), "PNG") for number in range(20)}
    pictures = unpack(make_zip(tmp_path / "logos.zip", files | {"dark.png": encoded(logo(99, (9, 9, 90)), "PNG")}), out)
    assert len(pictures.paths) == 21
    assert pictures.notes == {"transparent and light, laid on dark grey": 20, "transparent, laid on white": 1}
    levels = [np.asarray(load_picture(path)).astype(int) for path in pictures.paths]
    assert min(picture.max() - picture.min() for picture in levels) > 140


# Errors


def refused(source: Path, out: Path, limits: Limits = LIMITS) -> str:
    """The message of the error. Checks that nothing was left behind."""
    before = everything(source.parent)
    with pytest.raises(ArchiveError) as caught:
        unpack(source, out, limits)
    assert not out.exists()
    assert not out.parent.exists() or not os.listdir(out.parent)
    assert everything(source.parent) == before
    return str(caught.value)


def test_too_few_pictures_are_an_error_with_their_number(tmp_path: Path, out: Path) -> None:
    files = dict(list(TEN.items())[:7]) | {"b.txt": b"text"}
    error = refused(make_zip(tmp_path / "photos.zip", files), out)
    assert error.endswith(
        "photos.zip: holds 7 usable pictures; skipped: a text file (1); at least 8 pictures are needed"
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_an_empty_archive_is_an_error(tmp_path: Path, out: Path, kind: str) -> None:
    (tmp_path / "photos.folder").mkdir()
    assert "holds 0 usable pictures; at least 8 pictures are needed" in refused(
        MAKERS[kind](tmp_path / f"photos.{kind}", {}), out
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (picture(1), "is one picture (PNG), not an archive; give a zip"),
        (picture(1, "JPEG"), "is one picture (JPEG), not an archive; give a zip"),
        (b"hello", "is a text file, not an archive; give a zip"),
        (b"\n<!doctype HTML><html>log in", "is a web page, not an archive; download the archive itself"),
        (b"%PDF-1.7 ...", "is a PDF, not an archive; give a zip"),
        (b"\0\0\0\x14ftypqt  " + bytes(100), "is a video, not an archive; give a zip"),
        (b"Rar!\x1a\7\1\0" + bytes(2000), "is packed with RAR, which is not read; unpack it and give the folder"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(2000), "is packed with 7-Zip, which is not read; unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "is packed with zstd, which is not read; unpack it"),
        (b"\x1f\x8b junk", "is damaged, cut off or no archive ("),
        (bytes(range(256)) * 4, "is damaged, cut off or no archive ("),
        (b"", "is an empty file, not an archive; give a zip"),
    ],
)
def test_a_file_that_is_no_archive_is_named_in_the_error(tmp_path: Path, out: Path, content: bytes, what: str) -> None:
    (tmp_path / "photos.zip").write_bytes(content)
    assert f"photos.zip: {what}" in refused(tmp_path / "photos.zip", out)


def test_a_tar_whose_first_file_is_named_like_a_signature_is_read(tmp_path: Path, out: Path) -> None:
    source = make_tar(tmp_path / "photos.tar", {"GIF89a.gif": picture(20), "%PDF-": picture(21)} | TEN)
    assert len(unpack(source, out).paths) == 12


def test_a_missing_file_is_an_error(tmp_path: Path, out: Path) -> None:
    assert "no such file or folder; give a zip" in refused(tmp_path / "missing.zip", out)


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path, out: Path) -> None:
    os.mkfifo(tmp_path / "photos.zip")
    with pytest.raises(ArchiveError, match="no such file"):
        unpack(tmp_path / "photos.zip", out)


def encrypt(path: Path) -> Path:
    """Sets the encryption flag of every file of a zip, in both headers."""
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + offset] |= 1
            place = data.find(mark, place + 4)
    path.write_bytes(data)
    return path


def test_an_encrypted_zip_is_an_error_with_the_remedy(tmp_path: Path, out: Path) -> None:
    error = refused(encrypt(make_zip(tmp_path / "photos.zip", TEN, zipfile.ZIP_STORED)), out)
    assert "holds 0 usable pictures; skipped: encrypted: zip again without a password (10)" in error


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "folder"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_a_truncated_archive_is_an_error(tmp_path: Path, out: Path, kind: str, share: float) -> None:
    source = MAKERS[kind](tmp_path / f"photos.{kind}", {f"{i}.png": picture(i, side=60) for i in range(10)})
    data = source.read_bytes().rstrip(b"\0")
    source.write_bytes(data[: int(len(data) * share)])
    assert "is damaged, cut off or no archive" in refused(source, out)


def test_a_tar_truncated_between_two_files_is_an_error(tmp_path: Path, out: Path) -> None:
    source = make_tar(tmp_path / "photos.tar", TEN)
    with tarfile.open(source) as tar:
        end = tar.getmembers()[8].offset_data + 512 * -(-tar.getmembers()[8].size // 512)
    source.write_bytes(source.read_bytes()[:end])
    assert "its end is missing" in refused(source, out)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "folder"])
def test_archives_joined_to_one_file_are_refused(tmp_path: Path, out: Path, kind: str) -> None:
    source = MAKERS[kind](tmp_path / f"photos.{kind}", TEN)
    source.write_bytes(source.read_bytes() * 2)
    assert "such as another archive" in refused(source, out)


def test_a_folder_with_files_or_inside_the_source_is_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "photos", TEN)
    for place in (source, source / "out"):
        with pytest.raises(ArchiveError, match="is inside"):
            unpack(source, place)
    make_folder(tmp_path / "out", {"mine.txt": b"mine"})
    with pytest.raises(ArchiveError, match="already exists"):
        unpack(source, tmp_path / "out")
    assert everything(tmp_path / "out") == {"mine.txt": b"mine"}


@pytest.mark.parametrize("after", [0, 5, 12])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    real, opened = Path.open, []

    def full(path: Path, mode: str = "r", *rest: object, **named: object) -> object:
        if "w" in mode and out.parent in path.parents:
            opened.append(path)
            if len(opened) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, mode, *rest, **named)

    source = make_zip(tmp_path / "photos.zip", TEN)
    if after > len(TEN):  # all pictures are written by then
        monkeypatch.setattr(Pictures, "write_index", lambda pictures, folder: full(Path(folder, "index"), "w"))
        after = 0
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ArchiveError, match=r"pictures: cannot be written to \(No space left on device\); make room"):
        unpack(source, out)
    assert os.listdir(out.parent) == []


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "photos.zip", TEN)
    with pytest.raises(ArchiveError, match=r"cannot be written to \(Not a directory\)"):
        unpack(source, source / "out" / "pictures")


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, out: Path) -> None:
    source = make_zip(tmp_path / "photos.zip", {f"{i:04}.png": picture(i, side=100) for i in range(100)})
    code = "import sys; from clip_gen.data.archive import Path, unpack; unpack(*map(Path, sys.argv[1:]))"
    run = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)])
    while not (out.parent / ".unpacking-pictures" / "staged-3").exists() and run.poll() is None:
        time.sleep(0.002)
    run.kill()
    run.wait()
    assert not out.exists()
    assert len(unpack(source, out).paths) == 100
    assert os.listdir(out.parent) == [out.name]


# Hostile archives

CLIMBING = (
    *("../climbed.png", "a/../../climbed.png", "/absolute.png", "C:\\drive.png", "..\\climbed.png", "\\\\host\\a.png"),
    *(
        "a" * 3000 + ".png",
        "b/" * 500 + "b.png",
        " ",
        "\ud83d\ude00.png".encode("utf-16", "surrogatepass").decode("utf-16"),
    ),
)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_paths_in_an_archive_never_become_paths_on_disk(tmp_path: Path, out: Path, kind: str) -> None:
    files = TEN | {name: picture(100 + number) for number, name in enumerate(CLIMBING)}
    source = MAKERS[kind](tmp_path / f"photos.{kind}", files)
    pictures = unpack(source, out)
    assert len(pictures.paths) == 20
    assert all(path.parent == out for path in pictures.paths)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent != out} == {source.name}
    assert not Path("/absolute.png").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_two_files_of_the_same_name_are_both_used(tmp_path: Path, out: Path, kind: str) -> None:
    source = tmp_path / f"photos.{kind}"
    if kind == "zip":
        make_zip(source, TEN)
        with zipfile.ZipFile(source, "a") as archive:
            archive.writestr("3.png", picture(33))
    else:
        make_tar(source, TEN)
        with tarfile.open(source, "a") as tar:
            member = tarfile.TarInfo("3.png")
            member.size = len(picture(33))
            tar.addfile(member, io.BytesIO(picture(33)))
    pictures = unpack(source, out)
    assert [path.read_bytes() for path in pictures.paths[3:5]] == [picture(3), picture(33)]


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.devmajor, made.devminor = kind, target, 1, 5
    return made


def test_links_in_a_tar_are_neither_followed_nor_written_through(tmp_path: Path, out: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    (secret := tmp_path / "secret.png").write_bytes(picture(77))
    links = (
        member("way", tarfile.SYMTYPE, str(outside)),
        member("secret.png", tarfile.SYMTYPE, str(secret)),
        member("hard.png", tarfile.LNKTYPE, str(secret)),
        member("000001.png", tarfile.SYMTYPE, str(outside / "1.png")),
        member("staged-6", tarfile.SYMTYPE, str(outside / "2.png")),
    )
    pictures = unpack(make_tar(tmp_path / "photos.tar", TEN | {"way/in.png": picture(78)}, others=links), out)
    assert os.listdir(outside) == []
    assert set(reasons(pictures).values()) == {"a link"}
    assert len(pictures.skipped) == 5
    assert len(pictures.paths) == 11
    assert picture(77) not in everything(out).values()
    assert not any(path.is_symlink() for path in out.iterdir())


def test_links_in_a_zip_and_links_out_of_a_folder_are_skipped(tmp_path: Path, out: Path) -> None:
    (secret := tmp_path / "secret.png").write_bytes(picture(77))
    source = make_zip(tmp_path / "photos.zip", TEN)
    with zipfile.ZipFile(source, "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(secret))
    assert reasons(unpack(source, out)) == {"link.png": "a link"}
    folder = make_folder(tmp_path / "photos", TEN)
    (tmp_path / "photos-2").mkdir()
    (tmp_path / "photos-2" / "1.png").write_bytes(picture(78))
    for name, target in (("link.png", secret), ("loop", folder), ("round.png", folder / "round.png")):
        (folder / name).symlink_to(target)
    (folder / "missing.png").symlink_to("nothing.png")
    (folder / "outside").symlink_to(tmp_path / "photos-2")
    os.mkfifo(folder / "pipe.png")
    (folder / "to pipe.png").symlink_to("pipe.png")
    pictures = unpack(folder, out.with_name("other"))
    assert len(pictures.paths) == 10
    assert {(one.name, one.reason, one.detail) for one in pictures.skipped} == {
        ("link.png", "a link", "its target is outside the folder"),
        ("loop", "a link", "its folder is read already"),
        ("missing.png", "a link", "its target does not exist"),
        ("outside", "a link", "its target is outside the folder"),
        ("pipe.png", "not a plain file", ""),
        ("round.png", "a link", "its target does not exist"),
        ("to pipe.png", "not a plain file", ""),
    }


@pytest.mark.parametrize("through_a_link", [False, True])
def test_links_inside_a_folder_are_followed(tmp_path: Path, out: Path, through_a_link: bool) -> None:
    """Like git-annex and DVC, which keep pictures under .git or .dvc with links to them."""
    folder = make_folder(tmp_path / "photos", {f".store/{name}": content for name, content in TEN.items()})
    (folder / "all").mkdir()
    for number in range(5):
        (folder / "all" / f"{number}.png").symlink_to(f"../.store/{number}.png")
    (folder / "album").symlink_to(folder / ".store")
    (folder / "again").symlink_to(folder / "all")
    if through_a_link:
        (tmp_path / "way").symlink_to(folder)
        folder = tmp_path / "way"
    before = archive_module.fingerprint(folder)
    pictures = unpack(folder, out)
    assert len(pictures.paths) == 10
    assert {(one.name, one.reason, one.detail) for one in pictures.skipped} == {
        ("again", "a link", "its folder is read already"),
        *((f"all/{number}.png", "a duplicate", f"of album/{number}.png") for number in range(5)),
    }
    (folder / ".store" / "11.png").write_bytes(picture(11))
    assert archive_module.fingerprint(folder) != before


def test_devices_and_pipes_in_a_tar_are_skipped(tmp_path: Path, out: Path) -> None:
    others = (member("zero.png", tarfile.CHRTYPE), member("disk", tarfile.BLKTYPE), member("pipe", tarfile.FIFOTYPE))
    pictures = unpack(make_tar(tmp_path / "photos.tar", TEN, others=others), out)
    assert reasons(pictures) == dict.fromkeys(("zero.png", "disk", "pipe"), "not a plain file")
    assert all(path.is_file() for path in out.iterdir())


@pytest.mark.parametrize("kind", MAKERS)
def test_too_many_files_are_refused(tmp_path: Path, out: Path, kind: str) -> None:
    files = TEN | {f"a/{number}": b"" for number in range(50)}
    source = MAKERS[kind](tmp_path / f"photos.{kind}", files)
    assert "holds more than 55 files; give fewer files" in refused(source, out, replace(LIMITS, max_entries=55))


def test_a_long_table_of_contents_is_refused_before_it_is_parsed(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_zip(tmp_path / "photos.zip", {f"{number}": b"" for number in range(3000)}, zipfile.ZIP_STORED)
    made = []
    monkeypatch.setattr(zipfile.ZipInfo, "_decodeExtra", lambda info: made.append(info))
    assert "holds more than 2,000 files" in refused(source, out, replace(LIMITS, max_entries=2000))
    assert not made
    monkeypatch.setattr(zips, "MAX_TABLE_BYTES", 70_000)
    assert "its table of contents has" in refused(source, out)


@pytest.mark.parametrize("kind", MAKERS)
def test_too_many_bytes_are_refused(tmp_path: Path, out: Path, kind: str) -> None:
    source = MAKERS[kind](tmp_path / f"photos.{kind}", {f"{i}.bmp": picture(i, "BMP", side=200) for i in range(10)})
    error = refused(source, out, replace(LIMITS, max_bytes=1_000_000))
    assert "holds more than 1,000,000 bytes unpacked" in error


@pytest.mark.parametrize("kind", ["zip", "deflate64.zip", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("name", ["bomb.bmp", ".hidden.txt"])
def test_an_archive_bomb_is_recognised_by_its_ratio(tmp_path: Path, out: Path, kind: str, name: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(buffer, "BMP")
    source = MAKERS[kind](tmp_path / f"photos.{kind}", TEN | {name: buffer.getvalue()})
    limits = replace(LIMITS, free_bytes=2**20)
    if kind.endswith("zip") and name == ".hidden.txt":  # skipped files of a zip are never unpacked
        assert len(unpack(source, out, limits).paths) == 10
    else:
        assert "times its own size, as archive bombs do" in refused(source, out, limits)


def test_archives_inside_archives_are_not_unpacked(tmp_path: Path, out: Path) -> None:
    """Like 42.zip: each level holds ten of the next, and the last a large flat picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(buffer, "BMP")
    inner = make_zip(tmp_path / "inner.zip", {"bomb.bmp": buffer.getvalue()}).read_bytes()
    for _ in range(3):
        inner = make_zip(tmp_path / "inner.zip", {f"{i}.zip": inner for i in range(10)}).read_bytes()
    source = make_zip(tmp_path / "photos.zip", TEN | {f"lib {i}.zip": inner for i in range(10)})
    pictures = unpack(source, out, replace(LIMITS, max_bytes=2**20, free_bytes=2**18))
    assert set(reasons(pictures).values()) == {"an archive inside: unpack it first"}
    assert len(pictures.paths) == 10


def change_table(path: Path, offset: int, values: bytes, name: bytes) -> Path:
    """Overwrites a field of one file in a zip's table of contents."""
    data = bytearray(path.read_bytes())
    place = data.index(name, data.index(b"PK\1\2")) - 46 + offset
    data[place : place + len(values)] = values
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [0, 10, 2**32 - 2])
def test_a_false_size_in_a_header_is_not_trusted(tmp_path: Path, out: Path, size: int) -> None:
    picture = Image.linear_gradient("L").resize((400, 400)).convert("RGB")
    files = TEN | {"false.bmp": encoded(picture, "BMP")}
    source = change_table(make_zip(tmp_path / "photos.zip", files), 24, struct.pack("<I", size), b"false.bmp")
    tracemalloc.start()
    pictures = unpack(source, out)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert len(pictures.paths) in (10, 11)  # 11 if the false size is too large
    assert set(reasons(pictures).values()) <= {"cannot be read", "an empty file"}


@pytest.mark.parametrize(
    ("offset", "values"), [(20, b"\xff\xff\xff\x7f"), (42, b"\xff\xff\xff\x7f"), (10, b"\x09\0"), (16, b"1234")]
)
def test_other_false_fields_of_a_zip_lose_one_picture(tmp_path: Path, out: Path, offset: int, values: bytes) -> None:
    """Packed size, place, method and checksum of 5.png."""
    source = change_table(make_zip(tmp_path / "photos.zip", TEN), offset, values, b"5.png")
    pictures = unpack(source, out)
    assert len(pictures.paths) in (9, 10)
    assert set(reasons(pictures)) <= {"5.png"}


def test_a_damaged_deflate64_file_loses_one_picture(tmp_path: Path, out: Path) -> None:
    source = make_deflate64_zip(tmp_path / "photos.zip", TEN)
    with zipfile.ZipFile(source) as archive:
        places = [archive.getinfo(name).header_offset + 35 + 200 for name in ("3.png", "5.png")]
    data = bytearray(source.read_bytes())
    data[places[0]] ^= 1
    data[places[1] : places[1] + 500] = b"\xff" * 500
    source.write_bytes(data)
    assert reasons(unpack(source, out)) == {"3.png": "cannot be read", "5.png": "cannot be read"}
    shortened = change_table(make_deflate64_zip(source, TEN), 20, struct.pack("<I", 700), b"5.png")
    assert reasons(unpack(shortened, out.with_name("other"))) == {"5.png": "cannot be read"}


def test_a_deflate64_bomb_is_not_unpacked_into_memory(tmp_path: Path, out: Path) -> None:
    bomb = encoded(Image.new("L", (9000, 9000)), "BMP")
    source = make_deflate64_zip(tmp_path / "photos.zip", TEN | {"bomb.bmp": bomb})
    tracemalloc.start()
    assert "times its own size, as archive bombs do" in refused(source, out, replace(LIMITS, free_bytes=2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(bomb) / 2


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_zipfile_unpacks_without_limit_are_skipped(tmp_path: Path, out: Path, method: int) -> None:
    source = make_zip(tmp_path / "photos.zip", TEN)
    with zipfile.ZipFile(source, "a", method) as archive:
        archive.writestr("bomb.bmp", b"BM" + bytes(10_000_000))
    tracemalloc.start()
    pictures = unpack(source, out)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert reasons(pictures) == {
        "bomb.bmp": "compressed in a way that is not read: zip again as Deflate, or give the folder"
    }


@pytest.mark.parametrize("name", [b"\xff\xfe\xfd.png", b"\0\0\0\0\0\0.png", b"\x1b[2J...png", b"CON...\xe4.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_odd_names_appear_only_as_text(tmp_path: Path, out: Path, kind: str, name: bytes) -> None:
    plain = b"longname.png"[-len(name) :]
    source = MAKERS[kind](tmp_path / f"photos.{kind}", TEN | {plain.decode(): TEN["1.png"]})
    data = source.read_bytes().replace(plain, name)
    if kind == "tar":
        data = with_checksum(data, data.index(name))
    source.write_bytes(data)
    pictures = unpack(source, out)
    assert len(pictures.paths) == 10
    assert all(skipped.name.isprintable() for skipped in pictures.skipped)
    json.dumps(pictures.as_json()).encode()


def with_checksum(data: bytes, place: int) -> bytes:
    header = bytearray(data[place : place + 512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


def test_a_name_marked_as_utf8_that_is_not_is_an_error(tmp_path: Path, out: Path) -> None:
    source = make_zip(tmp_path / "photos.zip", TEN | {"ä.png": TEN["1.png"]})
    source.write_bytes(source.read_bytes().replace("ä".encode(), b"\xff\xff"))
    assert "is damaged, cut off or no archive" in refused(source, out)


def tar_header(name: str, kind: bytes, size: int) -> bytes:
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    return made.tobuf(tarfile.GNU_FORMAT)


TEN_IN_A_TAR = b"".join(
    tar_header(name, tarfile.REGTYPE, len(content)) + content + bytes(-len(content) % 512)
    for name, content in TEN.items()
)


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE], ids=["pax", "gnu", "global"]
)
def test_a_header_as_large_as_memory_is_refused(tmp_path: Path, out: Path, kind: bytes) -> None:
    source = tmp_path / "photos.tar.xz"
    size = 300_000_000
    with lzma.open(source, "wb", preset=0) as file:
        file.write(TEN_IN_A_TAR + tar_header("x", kind, size))
        for _ in range(20):
            file.write(bytes(2**20))
    tracemalloc.start()
    error = refused(source, out)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert "a header in it is over 1,048,576 bytes" in error


def sparse_map() -> bytes:
    """A sparse file of format 1.0, whose map says that it is longer than it is."""
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n" + b"25 GNU.sparse.name=a.png\n"
    lines = b"999999999\n" + b"0\n" * 600_000
    return (
        tar_header("x", tarfile.XHDTYPE, len(records))
        + records.ljust(512, b"\0")
        + tar_header("a.png", tarfile.REGTYPE, len(lines))
        + lines
    )


@pytest.mark.parametrize(
    "hostile",
    [
        tar_header("x", tarfile.REGTYPE, 0)[:124]
        + b"\xff" * 10
        + b"\xf0\0"
        + tar_header("x", tarfile.REGTYPE, 0)[136:],
        b"".join(tar_header("x", tarfile.XHDTYPE, 10) + b"10 a=bcde\n".ljust(512, b"\0") for _ in range(900)),
        sparse_map(),
        tar_header("x", tarfile.XHDTYPE, 31) + b"31 GNU.sparse.map=no,numbers,..\n".ljust(512, b"\0") + TEN_IN_A_TAR,
        os.urandom(2000),
    ],
    ids=["negative size", "recursion", "sparse map", "no numbers", "noise"],
)
def test_headers_that_make_no_sense_are_refused(tmp_path: Path, out: Path, hostile: bytes) -> None:
    place = len(TEN_IN_A_TAR)
    data = TEN_IN_A_TAR + hostile
    if hostile[:1] == b"x":
        data = with_checksum(data, place)
    (tmp_path / "photos.tar").write_bytes(data + bytes(1024))
    assert "is damaged, cut off or no archive" in refused(tmp_path / "photos.tar", out)


def test_a_sparse_file_is_not_expanded(tmp_path: Path, out: Path) -> None:
    header = bytearray(tar_header("hole.png", tarfile.GNUTYPE_SPARSE, 0))
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"%011o\0" % (8 * 2**30 - 1)
    data = with_checksum(bytes(header), 0) + TEN_IN_A_TAR + bytes(1024)
    (tmp_path / "photos.tar").write_bytes(data)
    assert reasons(unpack(tmp_path / "photos.tar", out)) == {"hole.png": "not a plain file"}


def test_an_xz_that_requires_gigabytes_of_memory_is_refused(tmp_path: Path, out: Path) -> None:
    source = make_tar(tmp_path / "photos.tar.xz", TEN, "w:xz")
    data = bytearray(source.read_bytes())
    length = (data[12] + 1) * 4
    place = data.index(b"\x21\x01", 13) + 2
    data[place] = 38  # a dictionary of 2 GiB
    data[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(data[12 : 12 + length - 4]))
    source.write_bytes(data)
    assert "Memory usage limit" in refused(source, out)


def test_an_xz_of_several_streams_is_read_to_its_end(tmp_path: Path, out: Path) -> None:
    data = TEN_IN_A_TAR + bytes(1024)
    half = len(data) // 2
    padding = bytes(4 * 2**15)
    (tmp_path / "photos.tar.xz").write_bytes(
        lzma.compress(data[:half]) + padding + lzma.compress(data[half:]) + padding
    )
    assert len(unpack(tmp_path / "photos.tar.xz", out).paths) == 10


def test_a_file_that_cannot_be_opened_is_listed(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "photos", TEN)
    real = Path.open

    def denied(path: Path, *rest: object, **named: object) -> object:
        if path.name == "3.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **named)

    monkeypatch.setattr(Path, "open", denied)
    pictures = unpack(source, out)
    assert [(one.name, one.reason, one.detail) for one in pictures.skipped] == [
        ("3.png", "cannot be read", "Permission denied")
    ]


def test_pictures_are_not_kept_in_memory(tmp_path: Path, out: Path) -> None:
    source = make_folder(tmp_path / "photos", {f"{i:03}.bmp": picture(i, "BMP", side=200) for i in range(60)})
    tracemalloc.start()
    unpack(source, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 200 * 200 * 3


def test_reading_pictures_needs_no_torch() -> None:
    code = "import sys, clip_gen.data.archive; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, *limits: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archive_module, "decode", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(make_zip(tmp_path / "photos.zip", TEN), out)
    assert os.listdir(out.parent) == []
    shutil.rmtree(out.parent)


def test_a_large_photograph_is_decoded_at_a_smaller_scale_for_training(tmp_path: Path) -> None:
    rows, columns, channels = np.ogrid[:1600, :1200, :3]
    pixels = 127 + 60 * (np.sin(rows / 90) + np.cos(columns / 70 + channels))
    Image.fromarray(pixels.astype("uint8")).save(tmp_path / "large.jpg", quality=95)
    whole, smaller = (load_picture(tmp_path / "large.jpg", side) for side in (None, 150))
    assert (whole.size, smaller.size) == ((1200, 1600), (150, 200))
    trained = PictureFiles([tmp_path / "large.jpg"], 40, crop=0.8)[0].astype(int)
    middle = whole.crop((0, 200, 1200, 1400)).resize((40, 40), Image.Resampling.BICUBIC)
    assert np.abs(trained - np.asarray(middle)).max() <= 6
