"""The command line: `python -m benchmarks NAME [options]`; `python -m benchmarks NAME --help` lists the options."""

from __future__ import annotations

import argparse
import sys

from benchmarks import (
    busy_machine,
    contact_sheet,
    few_pictures,
    masks,
    metrics_memory,
    own_pictures,
    precision,
    previews,
    published_size,
    row_delay,
    speed,
    stage_one,
    steering,
    streaming,
    training_sizes,
    windows,
)

BENCHMARKS = {
    "speed": (speed.main, "sampling, decoding, loading, predictions and requests beside a plain reference"),
    "busy-machine": (busy_machine.main, "how much other processes slow down sampling"),
    "contact-sheet": (contact_sheet.main, "the README's pictures"),
    "precision": (precision.main, "picture quality with weights in float16 and bfloat16"),
    "own-pictures": (own_pictures.main, "quality and memory of trainings on your own pictures"),
    "few-pictures": (few_pictures.main, "style, things and copies after fine-tuning on few pictures"),
    "masks": (masks.main, "one of two objects replaced by another, under a mask"),
    "metrics-memory": (metrics_memory.main, "memory of the metrics of an evaluation on 50,000 pictures"),
    "previews": (previews.main, "how much progress and previews slow down drawing"),
    "steering": (steering.main, "image prompts, negative prompts and weights, graded by the judge"),
    "streaming": (streaming.main, "memory and disk of a training on WebDataset shards larger than both"),
    "stage-1": (stage_one.main, "pictures a second and PSNR of stage 1, of two versions in turns"),
    "training-sizes": (training_sizes.main, "memory and pictures a second of training each size"),
    "published-size": (published_size.main, "seconds and memory of the published model's size"),
    "row-delay": (row_delay.main, "sampling of all rows at once and one after the other"),
    "windows": (windows.main, "a single candidate in windows of tokens and in single steps"),
}


def main(words: list[str]) -> None:
    names = "\n".join(f"  {name:16}{what}" for name, (_, what) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME")
    name = parser.parse_args(words[:1]).name
    run, _ = BENCHMARKS[name]
    run(words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
