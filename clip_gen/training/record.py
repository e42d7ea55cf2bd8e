"""training.json: what a training did, and warnings about what it had too little time for."""

from __future__ import annotations

import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from clip_gen.data.archive import Pictures
from clip_gen.training.encoding import few_pictures
from clip_gen.training.plan import Plan, TrainSettings, remedy
from clip_gen.training.progress import Reach
from clip_gen.weights.model_folder import ModelFolderError, load_record

log = logging.getLogger(__name__)

Stages = dict[str, dict[str, object]]  # the record of each stage


def training_record(
    settings: TrainSettings,
    plan: Plan,
    pictures: Pictures,
    held_back: int,
    stages: Stages,
    minutes: float,
) -> dict[str, object]:
    """minutes: of all starts; the stages' minutes count if they are more, as in a folder of an earlier version."""
    values = asdict(settings)
    # The record is public: no path of this machine, no secret of a URL.
    values["base"] = Path(urlsplit(settings.base).path).name
    # The last stage's limit counts: the export may have been interrupted and started again with another.
    values["max_minutes"] = list(stages.values())[-1].get("max_minutes", settings.max_minutes)
    return {
        "pictures": pictures.as_json() | {"held_back": held_back},
        "settings": values,
        "plan": asdict(plan),
        "stages": stages,
        "warnings": shortages(settings, plan, len(pictures.paths) - held_back, stages),
        "minutes": round(max(minutes, sum(stage["minutes"] for stage in stages.values())), 1),
        "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "vector-quantize-pytorch")},
    }


def earlier_record(model: Path, stages: Stages) -> dict[str, object]:
    """The parts of the model folder's training.json that a start without training must not change; empty if the folder
    is missing or has other stages.
    """
    try:
        record = load_record(model)
    except ModelFolderError:
        return {}
    kept = ("settings", "plan", "minutes", "versions") if record.get("stages") == stages else ()
    return {name: record[name] for name in kept if name in record}


def shortages(settings: TrainSettings, plan: Plan, pictures: int, stages: Stages) -> list[str]:
    """A sentence for each thing that the stages had too little time for."""
    sentences = []
    for name, values in stages.items():
        minutes = values.get("max_minutes", settings.max_minutes)
        steps, planned = values["steps"], values.get("planned_steps", 0)  # 0: by an earlier version
        reach = Reach(name, steps, planned, minutes, values.get("fine_tunes", False), remedy(settings, plan))
        if minutes and values.get("ended_by") == "time" and reach.too_few:
            # More minutes train only the last stage further.
            where = "" if name == list(stages)[-1] else ", in another folder"
            sentences.append(f"{name}: its time ended after {steps:,} of {planned:,} steps, {reach.advice()}{where}")
        encoded = values.get("pictures", pictures)
        if encoded < pictures:
            sentences.append(f"{few_pictures(encoded, pictures)}, in another folder")
    return sentences


def log_finished(out: Path, stages: Stages) -> None:
    """Says that the training was finished before this start, and how to train further."""
    last = list(stages.values())[-1]
    more = f"give more than {last['max_minutes']:g} max_minutes, or " if last.get("ended_by") == "time" else ""
    log.info(
        "%s holds a finished training (%s), so nothing is trained. To train further, %sstart a training in another "
        "folder with base=%s",
        out,
        ", ".join(f"{name}: {values['steps']} steps" for name, values in stages.items()),
        more,
        out / "weights.tar",
    )
