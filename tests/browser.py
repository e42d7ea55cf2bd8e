"""Debian's chromium, driven by Selenium, for the tests of the page and its screenshot."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from clip_gen.files import ROOT

PACKAGES = ROOT / ".ui-packages"
SECONDS = 250  # that a test waits for what the page shows, on a busy machine
DESKTOP, PHONE = (1280, 900), (390, 844)


def missing() -> str:
    """What the tests of the page lack on this machine; empty if nothing."""
    found = [f"{name} (apt-get install {package})" for name, package in
             (("chromium", "chromium"), ("chromedriver", "chromium-driver")) if not shutil.which(name)]  # fmt: skip
    return " and ".join(found + ([] if (PACKAGES / "installed").is_file() else ["Gradio (script/ui --help)"]))


@contextmanager
def page_server(*options: str) -> Iterator[str]:
    """script/ui at a free port. Yields its address; ends it with SIGTERM, after which it must leave no uploads."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{PACKAGES}", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "clip_gen.ui.server", f"--port={port}", *options]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            yield re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        finally:
            server.terminate()
            server.wait(SECONDS)


class Browser:
    """One window. Its methods wait until what they need is there."""

    def __init__(self, address: str, size: tuple[int, int] = DESKTOP, downloads: Path | None = None):
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        self.driver.command_executor.client_config.timeout = SECONDS
        self.address, self.downloads = address, downloads
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        if downloads:
            behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
            self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
        self.load()

    def load(self) -> None:
        """Loads the page, or loads it again, and waits for the examples of the model."""
        self.driver.get(self.address)
        self.wait(lambda: self.all("#examples button"))

    def wait(self, done: Callable[[], object]) -> object:
        """What done() returns, once it is true."""
        return WebDriverWait(self.driver, SECONDS, 0.1).until(lambda _: done())

    def all(self, selector: str) -> list[WebElement]:
        return [one for one in self.driver.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]

    def one(self, selector: str) -> WebElement:
        return self.wait(lambda: self.all(selector))[0]

    def click(self, selector: str, number: int = 0) -> None:
        element = self.wait(lambda: self.all(selector)[number:])[0]
        self.wait(element.is_enabled)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def fill(self, selector: str, text: str) -> None:
        """Replaces the text of a field."""
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def value(self, selector: str) -> str:
        return self.one(selector).get_attribute("value")

    def status(self, text: str) -> str:
        """The status line, once it contains a text."""
        return self.wait(lambda: found if text in (found := self.text("#status")) else None)

    def requests(self) -> set[str]:
        """The addresses that the page asked for since the last call."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return {one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"}

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """The whole page, or its upper part, as PNG."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(address: str, size: tuple[int, int] = DESKTOP, downloads: Path | None = None) -> Iterator[Browser]:
    window = Browser(address, size, downloads)
    try:
        yield window
    finally:
        window.driver.quit()


def headers(address: str) -> dict[str, str]:
    with urllib.request.urlopen(address, timeout=SECONDS) as reply:
        return {name.lower(): value for name, value in reply.headers.items()}
