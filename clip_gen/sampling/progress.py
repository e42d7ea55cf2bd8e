"""What the caller of a request hears while its candidates are drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """How far a request is."""

    tokens: int  # sampled so far, of all candidates
    total_tokens: int
    seconds: float  # since its first batch started
    preview: Image.Image | None = None  # the best picture so far, if there is a new one


class Listener:
    """Takes reports from the batcher's thread to the caller's, and calls the caller's function there.

    So the function may take its time, and what it raises and logs belongs to its request. seconds: between two reports
    at least. previews: whether reports have pictures.
    """

    def __init__(self, function: Callable[[Progress], None], seconds: float, previews: bool):
        self.previews = previews
        self._function, self._seconds, self._due_at = function, seconds, time.monotonic() + seconds
        self._reports: SimpleQueue[Progress | None] = SimpleQueue()

    @property
    def due(self) -> bool:
        """Whether it is time for a report, and the function has taken the last one."""
        return time.monotonic() >= self._due_at and self._reports.empty()

    def report(self, progress: Progress) -> None:
        self._due_at = time.monotonic() + self._seconds
        self._reports.put(progress)

    def listen(self, result: Future) -> None:
        """Calls the function with each report until the request has its result."""
        result.add_done_callback(lambda _: self._reports.put(None))
        while (progress := self._reports.get()) is not None:
            self._function(progress)


def fill_unsampled(tokens: Tensor, side: int) -> Tensor:
    """Tokens (n, side²) with those that are -1 replaced: by the one above, in the first row by the one to the left.

    So a decoder that looks at neighbours sees what the picture may go on with. The first token must be there.
    """
    grid = tokens.unflatten(1, (side, side)).clone()
    first = grid[:, 0]
    nearest = torch.where(first < 0, 0, torch.arange(side, device=tokens.device)).cummax(dim=1).values
    grid[:, 0] = first.gather(1, nearest)
    for row in range(1, side):
        grid[:, row] = torch.where(grid[:, row] < 0, grid[:, row - 1], grid[:, row])
    return grid.flatten(1)
