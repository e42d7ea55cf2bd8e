"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_not(path: Path) -> Iterator[str]:
    """A temporary name beside `path` that takes its place when all went well, and is gone when not."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".saving-")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner's eyes only
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
