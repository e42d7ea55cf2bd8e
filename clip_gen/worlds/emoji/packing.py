"""Makes `drawings.zip` from the npm packages of the drawings; script/pack-drawings downloads these and calls it.

    python -m clip_gen.worlds.emoji.packing NOTO TWEMOJI FLUENT drawings.zip

NOTO, TWEMOJI and FLUENT are the packages' unpacked folders. It needs resvg-py.
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from clip_gen.worlds.emoji.words import things

SIDE = 128
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {} {}">{}</svg>'


def pack(noto: Path, twemoji: Path, fluent: Path, out: Path) -> None:
    """Writes `style/name.webp` for all things and styles. The same packages give the same bytes."""
    sets = zip(vector_drawings(noto), vector_drawings(twemoji), reduced_drawings(fluent, noto), strict=True)
    with zipfile.ZipFile(out, "w") as archive:
        for name, drawings in zip(things(), sets, strict=True):
            for style, image in zip(("noto", "flat", "3d"), drawings, strict=True):
                # ZipInfo alone has a fixed date.
                archive.writestr(zipfile.ZipInfo(f"{style}/{name}.webp"), webp(image, lossless=True))


def slug(name: str) -> str:
    """The name of a thing in the packages of iconify."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("’", ""))


def vector_drawings(package: Path) -> Iterator[Image.Image]:
    """The drawing of each thing from a package of iconify."""
    import resvg_py  # not among the requirements

    table = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    for name in things():
        icon = {"width": table["width"], "height": table["height"]} | table["icons"][slug(name)]
        svg = SVG.format(icon["width"], icon["height"], icon["body"])
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        # Twemoji's watermelon is no square; the bundled archive has it stretched.
        yield image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def reduced_drawings(package: Path, iconify: Path) -> Iterator[Image.Image]:
    """The drawing of each thing from the package of Fluent Emoji, whose files are named by code points."""
    codes = {name: code for code, name in json.loads((iconify / "chars.json").read_text()).items()}
    for name in things():
        code = codes[slug(name)]
        paths = (package / "assets" / f"{code}{selector}.webp" for selector in ("", "-fe0f"))
        image = Image.open(next(path for path in paths if path.is_file())).convert("RGBA")
        small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        yield Image.open(io.BytesIO(webp(small, quality=90))).convert("RGBA")  # as the bundled archive was made


def webp(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "webp", method=6, **options)
    return file.getvalue()


if __name__ == "__main__":
    pack(*map(Path, sys.argv[1:]))
