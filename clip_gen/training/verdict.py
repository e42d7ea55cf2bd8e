"""The verdict at the top of a training's report: what was trained, how good it is, and whether prompts will work."""

from __future__ import annotations

from collections.abc import Mapping

from clip_gen.training.progress import STAGE_NAMES, shortage

# Lower limits of PSNR in dB, and what reconstructions are like from there on. At 18 dB a base's tokens are kept
# (decisions.py); published VQGANs reach about 20 dB on photographs.
QUALITIES = (
    (25.0, "very good: most details are kept"),
    (21.0, "good: edges and larger details are kept"),
    (18.0, "fair: things can be recognised, small details cannot"),
    (15.0, "weak: only coarse shapes are kept"),
    (0.0, "poor: little more than blurs of colour"),
)
POOR_DB = QUALITIES[-2][0]
FOLLOWS = 0.5  # the least share of drawings that CLIP recognises if they follow their embeddings

Record = Mapping[str, object]  # as in training.json


def verdict(record: Record, is_running: bool = False) -> str:
    """One paragraph about a training that is finished, or so far."""
    sentences = [*_what(record, is_running), *_reconstructions(record), *_follows(record)]
    return " ".join([*sentences, *_prompts(record, is_running), *_time(record, is_running)])


def _what(record: Record, is_running: bool) -> list[str]:
    settings, pictures, base = record["settings"], record["pictures"], record["base"]["name"]
    parts = [STAGE_NAMES[name] for name in record["stages"]]
    names = " and ".join(parts or ["the networks"])
    side, verb = record["plan"]["model"]["vqgan"]["resolution"], "are being" if is_running else "were"
    if record["stages"].get("vqgan", {}).get("tokens_kept"):
        names = names.replace("the VQGAN", "the VQGAN's decoder")
    if settings["size"] == "base":
        what = f"From the base model {base}, {names} {verb} fine-tuned"
    else:
        what = f"New networks of size {settings['size']} ({names}) {verb} trained, with the CLIP of {base},"
    learnt, held_back = pictures["used"] - pictures["held_back"], pictures["held_back"]
    skipped = f", and {len(pictures['skipped']):,} files were skipped" if pictures["skipped"] else ""
    return [
        f"{what} on {learnt:,} pictures at {side} × {side} pixels.",
        f"{held_back:,} more were held back to measure on{skipped}.",
    ]


def _reconstructions(record: Record) -> list[str]:
    psnr = reconstruction_psnr(record)
    if psnr is None:
        return []
    quality = next(words for least, words in QUALITIES if psnr >= least or least == 0)
    return [f"The VQGAN gives held-back pictures back at {psnr:.1f} dB (PSNR), which is {quality}."]


def reconstruction_psnr(record: Record) -> float | None:
    """In dB; None before the first measurement."""
    stages = record["stages"]
    return stages.get("vqgan", {}).get("val_psnr", stages.get("gpt", {}).get("psnr"))


def _follows(record: Record) -> list[str]:
    share = record["stages"].get("gpt", {}).get("recognised")
    if share is None:
        return []
    return [
        f"Of what the transformer draws from embeddings of held-back pictures, CLIP finds {share:.0%} nearest to the "
        "right picture."
    ]


def _prompts(record: Record, is_running: bool) -> list[str]:
    """Whether prompts can be expected to work, and why."""
    stages = record["stages"]
    if is_running and record["settings"]["stage"] != "vqgan":
        return ["What prompts can do shows when the transformer is trained.", *_words(record)]
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
    gpt, psnr = record["stages"]["gpt"], reconstruction_psnr(record)
    steps, planned = gpt.get("steps", 0), gpt.get("planned_steps", 0)
    few = gpt.get("ended_by") == "time" and shortage("gpt", steps, planned, 1.0, gpt.get("fine_tunes", False))
    problems = [f"the transformer had {steps:,} of {planned:,} steps"] if few else []
    problems += ["reconstructions are poor"] if psnr is not None and psnr < POOR_DB else []
    follows = gpt.get("recognised", 1.0) >= FOLLOWS
    return problems + ([] if follows else ["what is drawn hardly follows its embedding"])


def _words(record: Record) -> list[str]:
    """Which words CLIP knows. It is the base's, and no training on pictures teaches it others."""
    base, knows = record["base"]["name"], record["base"].get("knows")
    if knows:
        return [f"The CLIP of {base} knows only its own world, and nothing about other things: {knows}."]
    return [f"Words come from the CLIP of {base}, which this training leaves as it is."]


def _time(record: Record, is_running: bool) -> list[str]:
    last = list(record["stages"].values())[-1:]
    if is_running or not last or last[0].get("ended_by") != "time":
        return []
    return ["Time ended the last stage: the same command with more max_minutes trains it further."]
