"""The format of a picture file by its first bytes and its name, or the reason why it is not a supported picture."""

from __future__ import annotations

import re
import struct
from pathlib import PurePosixPath

HEAD_BYTES = 1024  # first bytes of a file that kind_of needs
READ = "JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC, AVIF, JPEG 2000, ICO, PPM or TGA"

# Reasons: what the file is and, if that helps, what to give instead.
ARCHIVE = "an archive inside: unpack it first"
CAMERA_RAW = "camera raw: export as JPEG"
DRAWING_PROGRAM = "a file of a drawing program: export as PNG"
EMPTY = "an empty file"
JPEG_XL = "JPEG XL: export as JPEG or PNG"
NO_PICTURE = f"not a picture ({READ})"
PDF = "a PDF: export its pages as pictures"
TEXT = "a text file"
VECTOR = "a vector drawing: export as PNG"
VIDEO = "a video: export pictures of it"
WEB_PAGE = "a web page: download the picture itself"

PICTURES = (
    ((b"\xff\xd8\xff",), "JPEG"),
    ((b"\x89PNG\r\n\x1a\n",), "PNG"),
    ((b"GIF87a", b"GIF89a"), "GIF"),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
    ((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"), "JPEG2000"),
)
BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)  # many texts begin with "BM" too
PPM = re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+(#[^\n]*\n\s*)*\d+\s")
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
AVIF_BRANDS = {b"avif", b"avis"}
ANY_STILL_BRANDS = {b"mif1", b"msf1"}  # HEIC or AVIF: the other brands decide
TAR_MARK = slice(257, 262)

OTHERS = (
    ((b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"), ARCHIVE),
    ((b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM", b"II\x1a\0\0\0HEAPCCDR"), CAMERA_RAW),
    ((b"8BPS", b"gimp xcf"), DRAWING_PROGRAM),
    ((b"%!PS", b"\xc5\xd0\xd3\xc6"), VECTOR),  # the second: EPS with a preview
    ((b"\x1aE\xdf\xa3", b"\0\0\1\xba"), VIDEO),  # Matroska and WebM; MPEG
    ((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"), JPEG_XL),
)
RAW_NAMES = {
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef"),
    *(".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
}
NAMES = dict.fromkeys(RAW_NAMES, CAMERA_RAW)
NAMES |= dict.fromkeys((".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".wmv"), VIDEO)
NAMES |= dict.fromkeys((".svg", ".svgz", ".eps", ".ai", ".cdr", ".emf", ".wmf"), VECTOR)
NAMES |= dict.fromkeys((".afphoto", ".kra", ".procreate", ".psb", ".psd", ".xcf"), DRAWING_PROGRAM)
NAMES |= {".pdf": PDF}

WEB_PAGES = re.compile(rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype html|html|head|body|title|script|meta)\b", re.S)
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class UnusableError(ValueError):
    """The file cannot be used. `reason` is the same for all such files; `detail` may be empty."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def kind_of(head: bytes, name: str = "") -> str:
    """PIL's name of the format of a file with these first HEAD_BYTES; UnusableError for anything but a picture.

    The content decides; `name` is used only if the content does not.
    """
    kind = _picture_kind(head)
    if kind == "TIFF" and (head[8:10] == b"CR" or _suffix(name) in RAW_NAMES):
        raise UnusableError(CAMERA_RAW)  # most raw files are TIFFs, and PIL would read their thumbnail
    if kind is None:
        raise UnusableError(_other(head, name))
    return kind


def _picture_kind(head: bytes) -> str | None:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADER_BYTES:
        return "BMP"
    if head[4:8] == b"ftyp":
        return _still_kind(head)
    if head[:4] == b"\0\0\1\0" and head[4:6] != b"\0\0":
        return "ICO"
    if PPM.match(head):
        return "PPM"
    known = next((kind for starts, kind in PICTURES if head.startswith(starts)), None)
    return known or ("TGA" if _may_be_tga(head) else None)


def _still_kind(head: bytes) -> str | None:
    """HEIF or AVIF, by the brands in the first box of an ISO media file; None for videos and others."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[place : place + 4] for place in (8, *range(16, end - 3, 4))}
    first = {head[8:12]}
    relevant = brands if first <= ANY_STILL_BRANDS else first
    if relevant & AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if relevant & (HEIC_BRANDS | ANY_STILL_BRANDS) else None


def _may_be_tga(head: bytes) -> bool:
    """Whether the header may be a TGA's. TGA has no signature, but few headers are valid."""
    if len(head) < 18:
        return False
    _, palette, kind, first, colours, bits, _, _, width, height, depth, flags = struct.unpack("<3B2HB4H2B", head[:18])
    plain = kind in (2, 3, 10, 11) and not any((palette, first, colours, bits))
    mapped = kind in (1, 9) and palette == 1 and first == 0 and 1 <= colours <= 256 and bits in (15, 16, 24, 32)
    return (plain or mapped) and min(width, height) > 0 and depth in (8, 15, 16, 24, 32) and flags & 0xC0 == 0


def _other(head: bytes, name: str) -> str:
    """The reason for a file that is not a picture."""
    if not head:
        return EMPTY
    suffix = _suffix(name)
    if known := next((reason for starts, reason in OTHERS if head.startswith(starts)), None):
        return NAMES.get(suffix, known) if known == ARCHIVE else known  # .svgz, .kra
    if head[TAR_MARK] == b"ustar":
        return ARCHIVE
    if b"%PDF-" in head:
        return PDF
    if head[4:8] == b"ftyp":
        return CAMERA_RAW if head[8:12] == b"crx " else VIDEO
    if head[:4] == b"RIFF":
        return VIDEO if head[8:12] == b"AVI " else NO_PICTURE
    if not _is_text(head):
        return NAMES.get(suffix, NO_PICTURE)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if WEB_PAGES.match(text):
        return WEB_PAGE
    return VECTOR if text.startswith(b"<") and b"<svg" in text else NAMES.get(suffix, TEXT)


def _is_text(head: bytes) -> bool:
    """Whether this is UTF-16 with a byte order mark, or text without the control characters of binary files."""
    if head.startswith(UTF_16):
        return True
    return not any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head)


def _suffix(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).suffix.lower()
