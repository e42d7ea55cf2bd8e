"""ICC profiles of version 2, written byte by byte: cameras' and printers' own are not free to copy."""

from __future__ import annotations

import struct

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_GAMMA = 563 / 256
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def xyz(chromaticity: tuple[float, float]) -> np.ndarray:
    x, y = chromaticity
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(primaries: tuple) -> np.ndarray:
    """(3, 3): linear RGB of these primaries and white D65 to XYZ."""
    columns = np.stack([xyz(one) for one in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz(D65))


def srgb_decoded(levels: np.ndarray) -> np.ndarray:
    """[0, 1] to linear light."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def srgb_encoded(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def as_srgb(pixels: np.ndarray, primaries: tuple, gamma: float | None) -> np.ndarray:
    """The reference: (..., 3) uint8 of these primaries to sRGB, 0 to 255 as floats. gamma None: sRGB's curve."""
    levels = pixels / 255
    light = srgb_decoded(levels) if gamma is None else levels**gamma
    return 255 * srgb_encoded(light @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T)


def rgb_profile(primaries: tuple, gamma: float | None) -> bytes:
    """gamma None: sRGB's curve."""
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ xyz(D65))) @ BRADFORD
    colorants = adapted @ to_xyz(primaries)
    tags = {name: _xyz_tag(colorants[:, place]) for place, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile(paper: tuple[float, float, float], inks: list[tuple[float, float, float]]) -> bytes:
    """A table of two levels an ink; Lab of the paper, and of the ink alone for cyan, magenta, yellow and black. Inks on
    each other subtract from the paper what each does.
    """
    white, table = np.array(paper), []
    for corner in np.ndindex(2, 2, 2, 2):
        lab = white + sum((np.array(ink) - white) * on for ink, on in zip(inks, corner, strict=True))
        table += [lab[0] / 100 * 255, lab[1] + 128, lab[2] + 128]
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel())
    entries = np.array(table).clip(0, 255).round().astype(np.uint8).tobytes()
    a2b = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + entries + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", dict.fromkeys((b"A2B0", b"A2B1", b"A2B2"), a2b))


def _profile(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"test profile\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + b"CC0\0",
        b"wtpt": _xyz_tag(D50),
        **tags,
    }
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    places: dict[bytes, int] = {}
    for name, content in tags.items():
        if content not in places:
            places[content] = start + len(data)
            data += content + bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, places[content], len(content))
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"test", 0x02400000, device, space, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(D50)
    return header.ljust(128, b"\0") + table + data


def _fixed(values: np.ndarray) -> bytes:
    return struct.pack(">3i", *np.round(np.asarray(values) * 65536).astype(int))


def _xyz_tag(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)


def _curve(gamma: float | None) -> bytes:
    if gamma is not None:
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    levels = np.round(srgb_decoded(np.linspace(0, 1, 1024)) * 65535).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(levels)) + levels.tobytes()
