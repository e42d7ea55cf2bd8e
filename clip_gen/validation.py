"""Checks a prompt and its settings before a model is loaded."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from numbers import Integral, Real

from clip_gen.prompts import parse_prompt

MAX_CANDIDATES = 256  # repeated in predict.py, since Cog needs a literal
MAX_SEED = 2**31 - 1
SAY_WHAT = "say what to draw, for example: a cat on a blue background"

# Emoji outside Unicode's category So, and the keycap that makes emoji of # and *.
OTHER_EMOJI = "‼⁉↔◻◼◽◾⤴⤵〰\u20e3"
# Invisible letters and symbols: Hangul fillers, the Braille blank, replacement characters.
BLANK = "\u115f\u1160\u3164\uffa0\u2800\ufffc\ufffd"


def check_request(
    prompt: str,
    candidates: int,
    num_outputs: int,
    seed: int | None,
    clip_rerank: bool,
    image: object = None,
    image_weight: float = 0.5,
    negative_prompt: str = "",
    init_image: object = None,
    mask: object = None,
    **others: object,
) -> None:
    """ValueError with the value and the remedy. others: the inputs of check_sampling; further ones are ignored."""
    if prompt == "" and image is None:
        raise ValueError(f"there is neither a prompt nor an image; {SAY_WHAT}, or give a picture as image")
    if prompt != "":
        check_prompt(prompt)
    if negative_prompt != "":
        check_prompt(negative_prompt, "negative_prompt", "say what the pictures should not show, or leave it out")
    if init_image is None and mask is not None:
        raise ValueError("mask is given without init_image; give the picture to redraw as init_image")
    if init_image is not None and mask is None:
        raise ValueError(
            "init_image is given without mask; give a picture that is white where to redraw as mask, "
            "or use image for variations of the whole picture"
        )
    check_number("image_weight", image_weight, 0, 1, "0: the prompt alone, 1: the image alone")
    if not isinstance(clip_rerank, bool):
        raise ValueError(f"clip_rerank is {clip_rerank!r}; give True or False")
    check_number("candidates", candidates, 1, MAX_CANDIDATES, whole=True)
    check_number("num_outputs", num_outputs, 1, MAX_CANDIDATES, whole=True)
    if clip_rerank and num_outputs > candidates:
        raise ValueError(
            f"num_outputs is {num_outputs}, more than the {candidates} candidates; "
            f"ask for {candidates} or fewer, or raise candidates to {num_outputs}"
        )
    if seed is not None:
        check_number("seed", seed, 0, MAX_SEED, whole=True)
    check_sampling(**others)


def check_sampling(temperature: float, top_k: int, top_p: float, guidance: float, **_others: object) -> None:
    """ValueError with the value and the remedy."""
    check_number("temperature", temperature, 0, 10, "0: always the likeliest token")
    check_number("top_k", top_k, 0, math.inf, "0: choose from all tokens", whole=True)
    check_number("top_p", top_p, 0, 1, "1: choose from all tokens")
    check_number("guidance", guidance, 0, 20, "1: off")


def without_effect(values: Mapping[str, object], defaults: Mapping[str, object]) -> list[str]:
    """Warnings about settings that were changed but have no effect."""
    changed = {name for name, default in defaults.items() if values[name] != default}
    warnings = []
    if "output_quality" in changed and values["output_format"] == "png":
        warnings.append(f"output_quality is {values['output_quality']}, which does nothing: png is always lossless")
    if "image_weight" in changed and not (values["prompt"] and values["image"]):
        warnings.append(
            f"image_weight is {values['image_weight']:g}, which does nothing without both a prompt and an image"
        )
    if "candidates" in changed and not values["clip_rerank"] and values["candidates"] != values["num_outputs"]:
        warnings.append(
            f"candidates is {values['candidates']}, which does nothing without clip_rerank: "
            f"{values['num_outputs']} are drawn"
        )
    return warnings


def check_prompt(prompt: str, name: str = "prompt", remedy: str = SAY_WHAT) -> None:
    """ValueError for a part without a letter, a digit or an emoji, for a malformed weight and for invalid Unicode."""
    if not isinstance(prompt, str):
        raise ValueError(f"{name} is {prompt!r}; {remedy}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is {prompt!r}, which is not UTF-8 text; use a terminal or file in UTF-8") from error
    for part in parse_prompt(prompt, name):
        if not any(map(_is_visible, part.text)):
            raise ValueError(f"{name} is {part.text!r}, without a letter, a digit or an emoji; {remedy}")


def _is_visible(character: str) -> bool:
    if character in BLANK:
        return False
    category = unicodedata.category(character)
    return category[0] in "LN" or category == "So" or character in OTHER_EMOJI


def check_number(name: str, value: object, low: float, high: float, note: str = "", whole: bool = False) -> None:
    """ValueError unless value is a number from low to high. NumPy's numbers are accepted, True and False are not.

    note: explains a value in the message.
    """
    noun = "a whole number" if whole else "a number"
    wanted = f"{noun}, {low} or more" if math.isinf(high) else f"{noun}, {low} to {high}"
    wanted += f" ({note})" if note else ""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ValueError(f"{name} is {value!r}; give {wanted}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; give {wanted}")
