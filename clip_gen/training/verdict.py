"""What a training's report says in words: the verdict at its top, and the settings with their defaults resolved.

The verdict tells what was trained, how well it reconstructs, and whether prompts can be expected to work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields

from clip_gen.training import copies
from clip_gen.training.plan import TrainSettings
from clip_gen.training.progress import shortage

# What reconstructions are like from so many dB of PSNR on, if that is also so many dB better than each picture's mean
# colour: plain pictures have a high PSNR with any VQGAN. The third are GOOD_DB and BETTER_DB of decisions.py.
POOR = "poor: little more than blurs of colour"
QUALITIES = (
    (25.0, 15.0, "very good: most details are kept"),
    (21.0, 10.0, "good: edges and larger details are kept"),
    (18.0, 6.0, "fair: things can be recognised, small details cannot"),
    (15.0, 3.0, "weak: only coarse shapes are kept"),
)
FOLLOWS = 0.5  # the least share of drawings that CLIP recognises if they follow their embeddings

Record = Mapping[str, object]  # as in training.json


def verdict(record: Record, is_running: bool = False) -> str:
    """One paragraph about a training that is finished, or so far."""
    sentences = [*_what(record, is_running), *_reconstructions(record), *_follows(record), *_copies(record)]
    return " ".join([*sentences, *_prompts(record, is_running), *_time(record, is_running)])


def _what(record: Record, is_running: bool) -> list[str]:
    settings, pictures, base = _settings(record), record["pictures"], record["base"]["name"]
    vqgan, small = record["stages"].get("vqgan", {}), record["plan"].get("lora_rank", 0)
    decoder = "'s decoder" if vqgan.get("tokens_kept") else ""
    gpt = f"a small part of the transformer (LoRA of rank {small})" if small else "the transformer"
    is_left_out = settings["stage"] == "both" and vqgan.get("planned_steps") == 0
    names = {"vqgan": f"the VQGAN{decoder}", "transformer": gpt} | ({"both": gpt} if is_left_out else {})
    parts = names.get(settings["stage"], f"the VQGAN{decoder} and {gpt}")
    verb = ("are" if is_running else "were") if " and " in parts else ("is" if is_running else "was")
    if settings["size"] == "base":
        what = f"{parts} of the base model {base} {verb} trained further"
    else:
        what = f"New networks of size {settings['size']}, {parts}, {verb} trained with the CLIP of {base}"
    learnt, held_back = pictures["used"] - pictures["held_back"], pictures["held_back"]
    side, files = record["plan"]["model"]["vqgan"]["resolution"], len(pictures["skipped"])
    skipped = f" {files:,} {'file was' if files == 1 else 'files were'} skipped." if files else ""
    if estimated := pictures.get("estimated"):
        skipped += f" The transformer learns from all of about {estimated:,} pictures, whose shards are streamed."
    return [
        f"{what[0].upper()}{what[1:]}, on {learnt:,} pictures at {side} × {side} pixels.",
        f"{held_back:,} more were held back to measure on.{skipped}",
    ]


def _settings(record: Record) -> dict[str, object]:
    """Earlier versions had fewer."""
    return asdict(TrainSettings()) | record["settings"]


def _reconstructions(record: Record) -> list[str]:
    psnr, mean_colour, quality = _quality(record)
    if psnr is None:
        return []
    compared = "" if mean_colour is None else f", {psnr - mean_colour:.1f} dB above their mean colours"
    return [f"The VQGAN gives held-back pictures back at {psnr:.1f} dB (PSNR){compared}, which is {quality}."]


def _quality(record: Record) -> tuple[float | None, float | None, str]:
    """PSNR of the reconstructions and of mean colours in dB, None where they were not measured, and one of the words
    above.
    """
    vqgan, gpt = (record["stages"].get(name, {}) for name in ("vqgan", "gpt"))
    psnr = vqgan.get("val_psnr", gpt.get("psnr"))
    mean_colour = vqgan.get("val_mean_colour_psnr", gpt.get("mean_colour_psnr"))
    if psnr is None:
        return None, None, ""
    gain = math.inf if mean_colour is None else psnr - mean_colour
    reached = (words for least, least_gain, words in QUALITIES if psnr >= least and gain >= least_gain)
    return psnr, mean_colour, next(reached, POOR)


def _follows(record: Record) -> list[str]:
    share = record["stages"].get("gpt", {}).get("recognised")
    if share is None:
        return []
    return [
        f"Of what the transformer draws from embeddings of held-back pictures, CLIP finds {share:.0%} nearest to the "
        "right picture."
    ]


def _copies(record: Record) -> list[str]:
    """A transformer that copies has a warning instead."""
    gpt = record["stages"].get("gpt", {})
    words = "" if copies.warning(gpt) or _is_too_short(gpt) else copies.in_words(gpt)
    return [f"It does not seem to copy training pictures: {words}."] if words else []


def _prompts(record: Record, is_running: bool) -> list[str]:
    """Whether prompts can be expected to work, and why."""
    stages = record["stages"]
    if is_running:
        return ["What prompts can do shows at the end.", *_words(record)]
    if "gpt" not in stages:
        if stages.get("vqgan", {}).get("tokens_kept"):
            return ["Prompts work as with the base model, whose transformer reads the same tokens."]
        return [
            "Prompts cannot work with these weights alone: the transformer does not know the new tokens. Train stage "
            "transformer from these weights."
        ]
    problems = _problems(record)
    if problems:
        return [f"Prompts cannot be expected to work well: {' and '.join(problems)}.", *_words(record)]
    return ["Prompts can be expected to work, as far as CLIP knows their words.", *_words(record)]


def _problems(record: Record) -> list[str]:
    gpt = record["stages"]["gpt"]
    steps, planned = gpt.get("steps", 0), gpt.get("planned_steps", 0)
    problems = [f"the CLIP of {record['base']['name']} does not know such pictures"] if _is_strange(record) else []
    problems += [f"the transformer had {steps:,} of {planned:,} steps"] if _is_too_short(gpt) else []
    problems += ["reconstructions are poor"] if _quality(record)[2] == POOR else []
    if gpt.get("recognised", 1.0) < FOLLOWS:
        problems += ["what is drawn hardly follows its embedding, or the pictures are much alike"]
    return problems


def _is_too_short(gpt: Record) -> bool:
    """Whether time ended stage 2 after too few steps to tell anything."""
    steps, planned = gpt.get("steps", 0), gpt.get("planned_steps", 0)
    return gpt.get("ended_by") == "time" and bool(shortage("gpt", steps, planned, 1.0, gpt.get("fine_tunes", False)))


def _is_strange(record: Record) -> bool:
    """Whether the base's CLIP was found not to know the pictures, and was kept."""
    return bool(record["base"].get("warning"))


def _words(record: Record) -> list[str]:
    """Which words CLIP knows. It is the base's, and no training on pictures teaches it others."""
    base, knows = record["base"]["name"], record["base"].get("knows")
    if knows:
        return [f"The CLIP of {base} knows its own world and nothing else. It knows {knows}."]
    return [f"Words come from the CLIP of {base}, which this training leaves as it is."]


def _time(record: Record, is_running: bool) -> list[str]:
    last = list(record["stages"].values())[-1:]
    if is_running or not last or last[0].get("ended_by") != "time":
        return []
    return ["Time ended the last stage: the same command with more max_minutes trains it further."]


def resolved_settings(record: Record) -> list[tuple[str, str, str, str]]:
    """Each setting: its name, the chosen value or "default", the value that was used, and its meaning."""
    specs, values = {spec.name: spec for spec in fields(TrainSettings)}, record["settings"]
    used = _used(record)
    rows = []
    for name, value in values.items():
        spec = specs.get(name)  # earlier versions had other settings
        is_default = spec is not None and value == spec.default
        shown = used.get(name, value)
        chosen = "default" if is_default else str(value)
        rows.append((name, chosen, str(shown), spec.metadata["description"] if spec else ""))
    return rows


def _used(record: Record) -> dict[str, str]:
    """What the plan and the stages made of settings whose default leaves the choice to them."""
    plan, stages, values = record["plan"], record["stages"], _settings(record)
    vqgan, gpt, model = plan["vqgan"], plan["transformer"], plan["model"]
    used = {
        "base": record["base"]["name"],
        "resolution": model["vqgan"]["resolution"],
        "codebook_size": model["vqgan"]["codebook_size"],
        "vqgan_steps": f"{vqgan['steps']:,}",
        "transformer_steps": f"{gpt['steps']:,}",
        "batch_size": f"{vqgan['batch_size']} in stage 1, {gpt['batch_size']} in stage 2",
        "vqgan_learning_rate": _rates(vqgan),
        "transformer_learning_rate": _rates(gpt),
        "mean_shift": model["bridge"].get("mean_shift", values["mean_shift"]),
        "sample_prompts": values["sample_prompts"] or "none",
        "max_minutes": f"{values['max_minutes']:g}" if values["max_minutes"] else "no limit",
    }
    kept = stages.get("vqgan", {}).get("tokens_kept")
    used |= {"tokens": "keep" if kept else "learn"} if kept is not None else {}
    used |= {"lora": f"on, of rank {plan['lora_rank']}"} if plan.get("lora_rank") else {"lora": "off"}
    perceptual = stages.get("vqgan", {}).get("perceptual_loss")
    used |= {"perceptual_weight": f"{values['perceptual_weight']:g}, by {perceptual}"} if perceptual else {}
    precisions = {str(stage["precision"]) for stage in stages.values() if "precision" in stage}
    return used | ({"precision": ", ".join(sorted(precisions))} if precisions else {})


def _rates(config: Mapping[str, float]) -> str:
    muon = f"; Muon's {config['muon_rate']:.3g}" if config.get("muon_rate") else ""
    return f"{config['learning_rate']:.3g}{muon}"
