"""Downloads one large file: resumes, tries again, verifies its SHA-256, and then renames it."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import subprocess
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
    part = path.with_name(f"{path.name}.part")
    if path.is_file() and (sha256 is None or sha256_of(path).startswith(sha256)):
        return
    for _ in range(2):  # the first may have resumed a damaged part
        if not _by_pget(url, part):
            _transfer(url, part)
        _refuse_web_page(url, part)
        digest = sha256_of(part)
        if sha256 is None or digest.startswith(sha256):
            os.replace(part, path)
            _notes(part).unlink(missing_ok=True)
            return
        _forget(part)
    wanted = sha256 if len(sha256) == len(digest) else f"one that starts with {sha256}"
    raise ValueError(
        f"{url}: its sha256 is {digest}, wanted is {wanted}; the server sends another file, try another --mirror"
    )


def _refuse_web_page(url: str, part: Path) -> None:
    with part.open("rb") as file:
        page = is_web_page(file.read(512))
    if page:
        _forget(part)
        raise ValueError(
            f"{url}: the server sends a web page, not the file; open the address in a browser to see why (a login, a "
            "proxy, a changed address), or give another --mirror"
        )


def check_room(folder: Path, wanted: int) -> None:
    """ValueError if the disk has less than `wanted` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ValueError(f"{folder}: {free / 1e9:.1f} GB are free there, wanted are {wanted / 1e9:.1f}; make room")


def _by_pget(url: str, part: Path) -> bool:
    """Downloads with pget, which uses several connections; whether it is installed and succeeded."""
    pget = shutil.which("pget")
    if not pget or part.exists():  # pget cannot resume
        return False
    done = subprocess.run([pget, url, str(part)], stdin=subprocess.DEVNULL).returncode == 0 and part.is_file()
    if not done:
        log.info("pget gave up; trying without it")
        _forget(part)
    return done


def _transfer(url: str, part: Path) -> None:
    """Connects until the file is complete; ValueError after MAX_FAILURES attempts in a row without new bytes."""
    failures = 0
    while True:
        before = _size(part)
        try:
            if _attempt(url, part):
                return
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            reason = _answer(error, url, part)
        except (OSError, http.client.HTTPException) as error:
            if disk_is_full(error):
                raise ValueError(f"{part.parent}: the disk is full; make room and start the command again") from error
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures = 1 if _size(part) > before else failures + 1
        if failures >= MAX_FAILURES:
            raise ValueError(
                f"{url}: cannot be downloaded ({reason}, {MAX_FAILURES} times in a row); check the network or give "
                "another --mirror; the same command resumes where this one stopped"
            )
        log.info(f"{reason}; trying again")
        time.sleep(BACK_OFF_SECONDS * 2 ** (failures - 1))


def _answer(error: urllib.error.HTTPError, url: str, part: Path) -> str:
    """Why the server did not send the file; ValueError if another attempt is pointless."""
    if error.code == 416:  # our part is not shorter than their file: it is another file
        _forget(part)
    elif 400 <= error.code < 500 and error.code not in TEMPORARY:
        raise ValueError(
            f"{url}: the server answers {error.code} ({error.reason}); look at the address, or give another --mirror"
        ) from error
    return f"the server answers {error.code} ({error.reason})"


def _attempt(url: str, part: Path) -> bool:
    """Downloads over one connection; whether the file is complete."""
    have, notes = _size(part), _read_notes(part)
    if have and notes.get("total") == have:  # interrupted after the last byte
        return True
    headers = {"Range": f"bytes={have}-"} if have and notes else {}
    if headers and notes["validator"]:
        headers["If-Range"] = notes["validator"]
    with open_url(url, headers=headers, deadline_seconds=DEADLINE_SECONDS) as reply:
        if reply.status != 206:  # the server ignored the Range header
            have = 0
        elif not _is_continuation(reply, have, notes):
            _forget(part)
            raise ConnectionError("the file on the server has changed")
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        check_room(part.parent, (total or have) - have)
        validator = reply.headers.get("ETag") or reply.headers.get("Last-Modified")
        strong = validator if validator and not validator.startswith("W/") else None
        with part.open("ab" if have else "wb") as file, _bar(part, have, total) as bar:
            # Write the notes only now, when a part of another file is gone.
            _notes(part).write_text(json.dumps({"validator": strong, "total": total}), encoding="utf-8")
            while chunk := reply.read1(CHUNK):  # read() would lose data when the connection breaks
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or _size(part) == total


def _is_continuation(reply: http.client.HTTPResponse, have: int, notes: dict[str, object]) -> bool:
    """Whether the reply is the rest of the same file."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
    return match is not None and int(match[1]) == have and int(match[2]) == notes["total"]


def _bar(part: Path, have: int, total: int | None) -> tqdm:
    seconds = 0.5 if sys.stderr.isatty() else 30  # few lines in a log file
    name = part.name.removesuffix(".part")
    return tqdm(desc=name, initial=have, total=total, unit="B", unit_scale=True, miniters=1, mininterval=seconds)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _notes(part: Path) -> Path:
    """The file with the validator and the length of the file that is being downloaded."""
    return part.with_name(f"{part.name}.json")


def _read_notes(part: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_notes(part).read_text(encoding="utf-8"))
    return {}


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)
