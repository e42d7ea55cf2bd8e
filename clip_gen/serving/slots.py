"""What Cog's server leaves undone for predictions: it ends none that takes too long, and removes no folders."""

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

PREDICTIONS = Path("/tmp/coglet/predictions")  # where Cog 0.23.1 makes two folders for each prediction
FOLDER_SECONDS = 60  # that they stay after it


class Slots:
    """What Cog leaves undone for the predictions in its slots: none takes too long, and their folders are removed.

    longest: seconds that a prediction may take; None for any time.
    """

    def __init__(self, longest: float | None):
        self.longest = longest
        self._in_use: Counter[str | None] = Counter()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """One prediction. TimeoutError once it has taken too long."""
        name = prediction_id()
        self._in_use[name] += 1
        try:
            async with asyncio.timeout(self.longest) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(
                f"the prediction took longer than {self.longest:g} seconds; ask for fewer candidates, or set "
                "CLIP_GEN_MAX_SECONDS for the server"
            ) from error
        finally:
            self._in_use[name] -= 1
            if name:
                asyncio.get_running_loop().call_later(FOLDER_SECONDS, self._remove_folders, name)

    def _remove_folders(self, name: str) -> None:
        if self._in_use[name]:
            return  # another prediction has the same name; its end removes them
        del self._in_use[name]
        remove_prediction_folders(name)


def longest_prediction() -> float:
    """How many seconds a prediction may hold its slot: CLIP_GEN_MAX_SECONDS, else half an hour."""
    text = os.environ.get("CLIP_GEN_MAX_SECONDS") or "1800"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise ValueError(f"CLIP_GEN_MAX_SECONDS is {text}; give a number of seconds, 1 or more")
    return seconds


def prediction_id() -> str | None:
    """The id of the prediction that this code runs for, which Cog 0.23.1 tells its own log alone; else None."""
    values = contextvars.copy_context().items()
    return next((value for variable, value in values if variable.name == "_coglet_prediction_id"), None)


def remove_prediction_folders(name: str) -> None:
    """Removes the folders that Cog made for a prediction, if they are empty. An id that leads out of the folder of
    predictions is left alone: what lies there may be somebody else's.
    """
    folder = Path(os.path.normpath(PREDICTIONS / name))
    if PREDICTIONS not in folder.parents:
        return
    levels = [folder, *folder.parents]
    for path in (folder / "inputs", folder / "outputs", *levels[: levels.index(PREDICTIONS)]):
        with contextlib.suppress(OSError):
            path.rmdir()
