"""script/predict and script/train in this process."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from unittest import mock

from clip_gen import __main__ as command_line
from clip_gen.serving import cli


def run_script(command: str, arguments: Sequence[str]) -> int:
    """Runs script/predict or script/train, and the command that replaces it. Returns the exit status."""
    with mock.patch("os.execv") as execv:
        try:
            cli.main(command, arguments)
        except SystemExit as exit:
            print(exit.code, file=sys.stderr)
            return 1
    _, [python, *words] = execv.call_args.args
    assert (python, words[:2]) == (sys.executable, ["-m", "clip_gen"])
    return command_line.main(words[2:])


def as_inputs(inputs: Mapping[str, object]) -> list[str]:
    """Inputs as options of the scripts: -i NAME=VALUE."""
    return [word for name, value in inputs.items() for word in ("-i", f"{name}={value}")]
