"""The command line, `python -m clip_gen COMMAND`; after `pip install` also `clip-gen COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

from clip_gen.files import set_compile_cache_folders

# Each module has add_arguments(parser) and main(arguments). It is imported only for its command: torch is slow.
COMMANDS = {
    "generate": ("clip_gen.generate", "draw pictures of a prompt"),
    "interpolate": ("clip_gen.interpolate", "draw pictures that turn one prompt into another"),
    "info": ("clip_gen.info", "print the command that draws a picture again"),
    "import": ("clip_gen.weights.importers.convert", "convert published weights to a model folder"),
    "pull": ("clip_gen.weights.pull", "download published weights and convert them to a model folder"),
    "shapes": ("clip_gen.worlds.shapes.folder", "write pictures of shapes, with or without captions"),
    "train": ("clip_gen.training.cli", "train on pictures without captions"),
    "train-shapes": ("clip_gen.worlds.shapes.recipe", "train the bundled model of shapes"),
    "train-emoji": ("clip_gen.worlds.emoji.recipe", "train the bundled model of emoji"),
    "optimise": ("clip_gen.evaluation.against_time", "compare a model of shapes or emoji with VQGAN+CLIP"),
    "evaluate": (
        "clip_gen.evaluation.cli",
        "measure a model on any pictures, or with a world's judges",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns 1 after an error in one sentence, 130 after Ctrl-C."""
    set_compile_cache_folders()
    words = sys.argv[1:] if arguments is None else arguments
    installed = os.path.basename(sys.argv[0]) == "clip-gen"
    parser = argparse.ArgumentParser(prog="clip-gen" if installed else "python -m clip_gen")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name, (module, what) in COMMANDS.items():
            options = {"help": what, "description": f"{what.capitalize()}."}
            command = commands.add_parser(name, conflict_handler="resolve", **options)  # evaluate replaces an option
            if words[:1] == [name]:
                importlib.import_module(module).add_arguments(command)
        chosen = parser.parse_args(words)
        importlib.import_module(COMMANDS[chosen.command][0]).main(chosen)
    except (ValueError, OSError) as error:
        print(f"{words[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
