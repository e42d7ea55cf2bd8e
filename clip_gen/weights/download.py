"""Downloads one large file: resumes, tries again, verifies its SHA-256, and then renames it."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import sys
import time
import urllib.error
from pathlib import Path

from tqdm import tqdm

from clip_gen.files import disk_is_full, is_web_page, sha256_of
from clip_gen.weights.url import open_url

log = logging.getLogger(__name__)

MAX_FAILURES = 6  # attempts in a row without new bytes
BACK_OFF_SECONDS = 1.0  # after the first failure; doubled after each further one
DEADLINE_SECONDS = 24 * 60 * 60  # per connection
CHUNK = 2**20
TEMPORARY = (408, 425, 429)  # client errors that are worth another attempt


def fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Downloads a file to `path`, atomically. An incomplete download is kept beside it, to be resumed.

    sha256: the SHA-256 or its first digits. ValueError if the server does not send the file, or sends another one.
    """
    if path.is_file() and (sha256 is None or sha256_of(path).startswith(sha256)):
        return
    part = _Part(path)
    resumed = part.size > 0
    _transfer(url, part)
    digest = sha256_of(part.path)
    with part.path.open("rb") as file:
        is_page = is_web_page(file.read(512))
    if not is_page and digest.startswith(sha256 or ""):
        os.replace(part.path, path)
        part.remove()
        return
    part.remove()
    if resumed:  # a power failure may have damaged the part
        return fetch(url, path, sha256)
    what = "a web page" if is_page else f"another file (its sha256 is {digest}, wanted is {sha256})"
    raise ValueError(
        f"{url}: the server sends {what}; open the address in a browser to see why (a login, a proxy, a changed "
        "address), or give another --mirror"
    )


class _Part:
    """An incomplete download beside its file, and a JSON file with the validator and the length of the whole."""

    def __init__(self, file: Path):
        self.path = file.with_name(f"{file.name}.part")
        self._notes = file.with_name(f"{file.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def read_notes(self) -> dict[str, object]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._notes.read_text(encoding="utf-8"))
        return {}

    def write_notes(self, validator: str, total: int | None) -> None:
        self._notes.write_text(json.dumps({"validator": validator, "total": total}), encoding="utf-8")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)


def _transfer(url: str, part: _Part) -> None:
    """Connects until the file is complete; ValueError after MAX_FAILURES attempts in a row without new bytes."""
    failures = 0
    while True:
        before = part.size
        try:
            if _attempt(url, part):
                return
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} ({error.reason})"
            if error.code == 416:  # our part is not shorter than their file: it is another file
                part.remove()
            elif error.code < 500 and error.code not in TEMPORARY:
                raise ValueError(f"{url}: {reason}; look at the address, or give another --mirror") from error
        except (OSError, http.client.HTTPException) as error:
            if disk_is_full(error):
                raise ValueError(
                    f"{part.path}: the disk is full; make room and start the same command again"
                ) from error
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures = 1 if part.size > before else failures + 1
        if failures >= MAX_FAILURES:
            raise ValueError(
                f"{url}: cannot be downloaded ({reason}, {MAX_FAILURES} times in a row); check the network or give "
                "another --mirror; the same command resumes where this one stopped"
            )
        log.info(f"{reason}; trying again")
        time.sleep(BACK_OFF_SECONDS * 2 ** (failures - 1))


def _attempt(url: str, part: _Part) -> bool:
    """Downloads over one connection; whether the file is complete."""
    have, notes = part.size, part.read_notes()
    if have and notes.get("total") == have:  # interrupted after the last byte
        return True
    headers = {"Range": f"bytes={have}-"} if have and notes else {}
    if headers and notes["validator"]:
        headers["If-Range"] = notes["validator"]
    with open_url(url, headers=headers, deadline_seconds=DEADLINE_SECONDS) as reply:
        if reply.status != 206:  # the server ignored the Range header
            have = 0
        elif not re.fullmatch(rf"bytes {have}-\d+/{notes['total']}", reply.headers.get("Content-Range", "")):
            part.remove()
            raise ConnectionError("the file on the server has changed")
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        validator = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
        with part.path.open("ab" if have else "wb") as file, _bar(part.path.stem, have, total) as bar:
            # Write the notes only now, when a part of another file is gone.
            part.write_notes("" if validator.startswith("W/") else validator, total)
            while chunk := reply.read1(CHUNK):  # read() would lose data when the connection breaks
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.size == total


def _bar(name: str, have: int, total: int | None) -> tqdm:
    seconds = 0.5 if sys.stderr.isatty() else 30  # few lines in a log file
    return tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True, miniters=1, mininterval=seconds)
