"""What a request asks for, before it is embedded."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_gen.data.decoding import as_rgb, load_picture
from clip_gen.data.file_kinds import UnusableError

_decoding = threading.Lock()  # a large picture may need a gigabyte while it is decoded


@dataclass(frozen=True)
class Condition:
    """What the pictures should show: a prompt, a picture or a mixture of both; and what they should not show."""

    prompt: str = ""
    picture: Image.Image | None = None
    image_weight: float = 0.5  # share of the picture beside a prompt
    negative_prompt: str = ""


def open_picture(image: str | Path | Image.Image, name: str = "image") -> Image.Image:
    """A picture, or the picture in a file, as upright RGB. ValueError with the input's name for an unusable file."""
    if isinstance(image, Image.Image):
        return as_rgb(image)
    try:
        with _decoding:
            return load_picture(Path(image))
    except UnusableError as error:
        raise ValueError(f"{name} cannot be used: {error}; give a picture, such as a JPEG or PNG file") from error
    except OSError as error:
        raise ValueError(f"{name} is {str(image)!r}, which cannot be read ({error.strerror})") from error
