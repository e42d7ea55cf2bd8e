"""script/screenshot: the page after a drawing, as a PNG of few colours."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

from browser import browser, missing, page_server
from PIL import Image
from selenium.webdriver.common.keys import Keys

HEIGHT = 900
PROMPTS = ("a slice of pizza", "a dog on a blue background")


def main(path: Path) -> None:
    if missing():
        sys.exit(f"script/screenshot: it needs {missing()}")
    server = functools.partial(page_server, "--model", "checkpoints/emoji", "--history")
    with tempfile.TemporaryDirectory() as folder, server(folder) as address, browser(address) as page:
        for prompt in PROMPTS:
            page.fill("#seed input", "7")
            page.fill("#prompt textarea", prompt + Keys.ENTER)
            page.wait(lambda prompt=prompt: prompt in page.text("#picture"))
        page.screenshot(path, HEIGHT)
    with Image.open(path) as taken:
        taken.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
