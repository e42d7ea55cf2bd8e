"""Checks of what is asked for, before a model is loaded: the prompt, and numbers with their ranges."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from numbers import Integral, Real

MAX_CANDIDATES = 256  # predict.py repeats it for Cog, which wants a literal
MAX_SEED = 2**31 - 1

# Emoji that Unicode does not count among the other symbols (category So), and the keycap that makes one of # and *.
OTHER_EMOJI = "‼⁉↔◻◼◽◾⤴⤵〰\u20e3"
# Letters and symbols that show nothing: fillers of Hangul, a blank of Braille, stand-ins for what could not be decoded.
BLANK = "\u115f\u1160\u3164\uffa0\u2800\ufffc\ufffd"


def check_request(
    prompt: str, candidates: int, num_outputs: int, seed: int | None, clip_rerank: bool, **others: object
) -> None:
    """Raises ValueError with the value and the remedy. others: the inputs of check_sampling, and any that need none."""
    check_prompt(prompt)
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
    """Raises ValueError with the value and the remedy."""
    check_number("temperature", temperature, 0, 10, "0: always the likeliest token")
    check_number("top_k", top_k, 0, math.inf, "0: choose from all tokens", whole=True)
    check_number("top_p", top_p, 0, 1, "1: choose from all tokens")
    check_number("guidance", guidance, 0, 20, "1: off")


def without_effect(values: Mapping[str, object], defaults: Mapping[str, object]) -> list[str]:
    """Sentences on settings that were changed from their defaults and do nothing beside the others."""
    changed = {name for name, default in defaults.items() if values[name] != default}
    found = []
    if "output_quality" in changed and values["output_format"] == "png":
        found.append(f"output_quality is {values['output_quality']}, which does nothing: png is always lossless")
    if "candidates" in changed and not values["clip_rerank"] and values["candidates"] != values["num_outputs"]:
        found.append(
            f"candidates is {values['candidates']}, which does nothing without clip_rerank: "
            f"{values['num_outputs']} are drawn"
        )
    return found


def check_prompt(prompt: str) -> None:
    """Raises ValueError for a prompt without a letter, a digit or an emoji, and for one that is not Unicode text."""
    remedy = "say what to draw, for example: a large red circle"
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}; {remedy}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt is {prompt!r}, which is not UTF-8 text; use a terminal or file in UTF-8") from error
    if not any(map(_says_something, prompt)):
        raise ValueError(f"prompt is {prompt!r}, without a letter, a digit or an emoji; {remedy}")


def _says_something(character: str) -> bool:
    if character in BLANK:
        return False
    category = unicodedata.category(character)
    return category[0] in "LN" or category == "So" or character in OTHER_EMOJI


def check_number(name: str, value: object, low: float, high: float, note: str = "", whole: bool = False) -> None:
    """Raises ValueError unless value is a number from low to high, NumPy's included; True and False are none.

    note: what a value means, for the message.
    """
    noun = "a whole number" if whole else "a number"
    wanted = f"{noun}, {low} or more" if math.isinf(high) else f"{noun}, {low} to {high}"
    wanted += f" ({note})" if note else ""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ValueError(f"{name} is {value!r}; give {wanted}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; give {wanted}")
