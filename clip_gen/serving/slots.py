"""What Cog's server does not do for predictions: limit their time, and remove the folders that it made for them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PREDICTIONS = Path("/tmp/coglet/predictions")  # Cog 0.23.1 makes two folders for each prediction here
FOLDER_SECONDS = 60  # from the end of a prediction until they are removed


class Slots:
    """Limits the time of predictions and removes their folders."""

    def __init__(self, max_seconds: float):
        self.max_seconds = max_seconds
        self._running: Counter[str | None] = Counter()  # predictions by their id, which clients choose

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """One prediction. Raises TimeoutError when it takes too long."""
        name = prediction_id()
        self._running[name] += 1
        try:
            async with asyncio.timeout(self.max_seconds):
                yield
        except TimeoutError as error:
            raise TimeoutError(
                f"the prediction took longer than {self.max_seconds:g} seconds; ask for fewer candidates, or set "
                "CLIP_GEN_MAX_SECONDS for the server"
            ) from error
        finally:
            self._running[name] -= 1
            if name:
                asyncio.get_running_loop().call_later(FOLDER_SECONDS, self._remove_folders, name)

    def _remove_folders(self, name: str) -> None:
        if not self._running[name]:  # else another prediction of that id removes them at its end
            del self._running[name]
            remove_prediction_folders(name)


def max_prediction_seconds() -> float:
    """CLIP_GEN_MAX_SECONDS, by default half an hour. ValueError unless it is a number from 1."""
    text = os.environ.get("CLIP_GEN_MAX_SECONDS") or "1800"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise ValueError(f"CLIP_GEN_MAX_SECONDS is {text}; give a number of seconds, 1 or more")
    return seconds


def prediction_id() -> str | None:
    """The id of the prediction that this code runs for. Cog 0.23.1 has it only in a context variable of its own."""
    values = contextvars.copy_context().items()
    return next((value for variable, value in values if variable.name == "_coglet_prediction_id"), None)


def remove_prediction_folders(name: str) -> None:
    """Removes the empty folders of a prediction. Nothing outside PREDICTIONS, where an id with `..` may point."""
    folder = Path(os.path.normpath(PREDICTIONS / name))
    if PREDICTIONS not in folder.parents:
        return
    levels = [folder, *folder.parents]
    for path in (folder / "inputs", folder / "outputs", *levels[: levels.index(PREDICTIONS)]):
        with contextlib.suppress(OSError):
            path.rmdir()
