"""The processes that run on this machine, and files as data URLs."""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path

from cog_server import Server


def data_url(path: Path) -> str:
    return f"data:application/zip;base64,{base64.b64encode(path.read_bytes()).decode()}"


def command_lines() -> dict[int, str]:
    """The command lines of all running processes."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words:  # a zombie has none
                found[int(entry.parent.name)] = words
    return found


def processes_of(group: int) -> list[str]:
    """The command lines of the running processes in a process group."""
    found = []
    for process, words in command_lines().items():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process) == group:
                found.append(words)
    return found


def trainings(server: Server) -> list[str]:
    """The running trainings of a server, whose pictures are in its temporary folder."""
    scratch = str(server.log.parent)
    return [words for words in command_lines().values() if "clip_gen train " in words and scratch in words]
