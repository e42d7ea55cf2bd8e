"""The processes that run on this machine, and what a request may hold."""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path

from cog_server import Server


def data_url(path: Path) -> str:
    return f"data:application/zip;base64,{base64.b64encode(path.read_bytes()).decode()}"


def command_lines() -> dict[int, str]:
    """What every process alive was started as."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            words = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words:  # one that is dead has none
                found[int(entry.parent.name)] = words
    return found


def processes_of(group: int) -> list[str]:
    """The command lines of the processes alive in a process group."""
    found = []
    for process, words in command_lines().items():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process) == group:
                found.append(words)
    return found


def trainings(server: Server) -> list[str]:
    """The trainings that the server has running: their pictures lie in its own temporary folder."""
    scratch = str(server.log.parent)
    return [words for words in command_lines().values() if "clip_gen train " in words and scratch in words]
