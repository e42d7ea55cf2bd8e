"""Where curves and sample images go beside the report, if they are asked for: CSV files, TensorBoard, Weights & Biases.

Lightning writes the values. They are in work/logs/ of the training's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

PACKAGES = {"csv": ("csv",), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of these
DEFAULT = ("csv", "tensorboard")


def logger_names(text: str) -> list[str]:
    """The loggers that `--loggers` names. auto: CSV, and TensorBoard if it is installed. ValueError for others and for
    packages that are missing.
    """
    if text in ("auto", "none"):
        return [name for name in DEFAULT if _is_installed(name)] if text == "auto" else []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f'loggers is "{text}"; give auto, none, or some of {", ".join(PACKAGES)} between commas')
        if not _is_installed(name):
            raise ValueError(f"loggers has {name}, which is not installed: pip install {PACKAGES[name][0]}")
    return names


def build_loggers(text: str, stage: str, out: Path) -> list[Logger]:
    """Lightning's loggers for one stage of the training in `out`. Each start has its own CSV file and its own run of
    Weights & Biases; TensorBoard continues its curves.
    """
    logs, build = out / "work" / "logs", []
    for name in logger_names(text):
        if name == "csv":
            build.append(CSVLogger(logs, name=f"csv/{stage}"))
        elif name == "tensorboard":
            build.append(TensorBoardLogger(logs, name="tensorboard", version=stage, default_hp_metric=False))
        else:
            logs.mkdir(parents=True, exist_ok=True)
            build.append(WandbLogger(f"{out.name} {stage}", logs, project="clip-gen", group=out.name))
    return build


def log_values(loggers: Sequence[Logger], step: int, values: Mapping[str, float]) -> None:
    for logger in loggers:
        logger.log_metrics(dict(values), step)


def log_picture(loggers: Sequence[Logger], step: int, path: Path) -> None:
    """Sends a picture to those loggers that show pictures."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image("samples", pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image("samples", [str(path)], step)


@contextmanager
def closing_runs(loggers: Sequence[Logger]) -> Iterator[None]:
    """Ends the run of Weights & Biases at the end, so that the next stage begins its own."""
    try:
        yield
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger) and logger.version:  # a run that has begun
                logger.experiment.finish()


def _is_installed(name: str) -> bool:
    return any(find_spec(package) for package in PACKAGES[name])
