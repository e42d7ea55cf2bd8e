"""`tests/mortal.py ARGUMENTS` is `python -m clip_gen ARGUMENTS` with a function that is slow and may kill its process.

WATCHED: the module and the name of the function, which takes 0.3 seconds longer and tells the paths that it is given.
KILLED, LAST: the number of one process of torchrun, and of the call of the function that it does not survive.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def watched(function: Callable[..., None]) -> Callable[..., None]:
    calls, one_at_a_time = itertools.count(1), threading.Lock()  # so the calls before the last are finished

    def slowly(*arguments: object, **options: object) -> None:
        with one_at_a_time:
            time.sleep(0.3)
            if os.environ.get("KILLED") == os.environ["RANK"] and next(calls) == int(os.environ["LAST"]):
                os.kill(os.getpid(), signal.SIGKILL)
            function(*arguments, **options)
            print(*(argument.name for argument in arguments if isinstance(argument, Path)), flush=True)

    return slowly


if __name__ == "__main__":
    module, _, name = os.environ["WATCHED"].partition(":")
    place = importlib.import_module(module)
    setattr(place, name, watched(getattr(place, name)))
    sys.exit(importlib.import_module("clip_gen.__main__").main(sys.argv[1:]))
