"""The pictures that a command names: archives, folders, single pictures, shards, and text files that list them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from braceexpand import UnbalancedBracesError, braceexpand

from clip_gen.data.archive import check_outside, fingerprint
from clip_gen.data.limits import ArchiveError, reason_of

LIST = ".txt"
URL = re.compile("https?://", re.IGNORECASE)
SHARD_NAMES = (".tar", ".tar.gz", ".tgz")
MAX_SHOWN = 3  # sources that a message names


@dataclass(frozen=True)
class Sources:
    """Archives, folders and pictures that are unpacked (paths), or WebDataset shards that are streamed (shards)."""

    paths: tuple[Path, ...] = ()
    shards: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = [*map(str, self.paths), *map(without_secrets, self.shards)]
        more = len(names) - MAX_SHOWN
        return ", ".join(names[:MAX_SHOWN]) + (f" and {more:,} more" if more > 0 else "")

    def check_outside(self, folder: Path) -> None:
        """ArchiveError if the folder is inside one of these, so that it would contain its own pictures."""
        for path in self.paths:
            check_outside(path, folder)

    def exist(self) -> bool:
        """Whether all paths exist. Shards are opened when they are read."""
        return all(path.exists() for path in self.paths)

    def fingerprint(self) -> str:
        """SHA-256 of the contents of archives, of the names and sizes in folders, and of the names of shards."""
        parts = [*map(fingerprint, self.paths), *map(without_secrets, self.shards)]
        return parts[0] if len(parts) == len(self.paths) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def find_sources(names: Sequence[str | Path]) -> Sources:
    """The sources behind these names. ArchiveError for a list that cannot be read, and for shards beside others.

    A .txt file stands for its lines, which are paths, relative to its folder, or URLs; lines with # are comments. A URL
    of a tar, and a pattern such as shards/{0000..0099}.tar, stand for shards.
    """
    paths: list[Path] = []
    shards: list[str] = []
    for name in _with_lines(names):
        is_pattern = "{" in name and not Path(name).exists()
        if URL.match(name) or is_pattern:
            shards += _expanded(name)
        else:
            paths.append(Path(name))
    if shards and paths:
        raise ArchiveError(
            f"{paths[0]}: cannot be read together with shards such as {without_secrets(shards[0])}; give only shards, "
            "with {0000..0099} in the names of local ones, or only files and folders"
        )
    return Sources(tuple(paths), tuple(shards))


def without_secrets(shard: str) -> str:
    """A shard's name for logs and records, without the query, user and password of a URL."""
    if not URL.match(shard):
        return shard
    url = urlsplit(shard)
    return url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _with_lines(names: Sequence[str | Path]) -> list[str]:
    found: list[str] = []
    for name in map(str, names):
        if not name.lower().endswith(LIST) or URL.match(name):
            found.append(name)
            continue
        try:
            lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ArchiveError(f"{name}: cannot be read as a list of paths ({reason_of(error)})") from error
        folder = Path(name).parent
        wanted = [line for line in lines if line and not line.startswith("#")]
        found += [line if URL.match(line) else str(folder / line) for line in wanted]
        if not wanted:
            raise ArchiveError(f"{name}: lists no paths; write one path or URL a line")
    return found


def _expanded(name: str) -> list[str]:
    """The shards of a pattern."""
    try:
        shards = list(braceexpand(name))
    except UnbalancedBracesError as error:
        raise ArchiveError(f"{name}: its braces do not match; write {{0000..0099}}") from error
    for shard in shards:
        path = urlsplit(shard).path if URL.match(shard) else shard
        if not PurePosixPath(path).name.lower().endswith(SHARD_NAMES):
            remedy = "; download other archives first" if URL.match(shard) else ""
            raise ArchiveError(f"{without_secrets(shard)}: is no tar; shards end in {', '.join(SHARD_NAMES)}{remedy}")
        if not URL.match(shard) and not Path(shard).is_file():
            raise ArchiveError(f"{shard}: no such file; {name} stands for {len(shards):,} shards")
    return shards
