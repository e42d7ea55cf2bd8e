r"""Prompts with weights: `a red circle:2 | a blue background:0.5`.

Weights are read only in prompts with a `|`. There a weight is the number after a part's last colon, 1 if it has no
colon. `\|` and `\:` stand for the characters themselves, in all prompts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PARTS = 16  # each is a run of CLIP's text encoder
MAX_WEIGHT = 1000

SEPARATOR = re.compile(r"(?<!\\)\|")
WEIGHTED = re.compile(r"(.*)(?<!\\):(.*)", re.DOTALL)  # up to the last colon
NUMBER = re.compile(r"\s*\+?(\d+\.?\d*|\.\d+)\s*", re.ASCII)


@dataclass(frozen=True)
class Part:
    text: str
    weight: float


def parse_prompt(prompt: str, name: str = "prompt") -> list[Part]:
    """The parts of a prompt. Their weights sum to 1; parts of weight 0 are left out.

    name: of the prompt, for messages. ValueError for a malformed weight, an empty part and weights that are all 0.
    """
    texts = SEPARATOR.split(prompt)
    if len(texts) == 1:
        return [Part(_unescaped(prompt), 1.0)]
    if len(texts) > MAX_PARTS:
        raise ValueError(f"{name} has {len(texts)} parts between |; give {MAX_PARTS} or fewer")
    parts = [_parse_part(text, name) for text in texts]
    total = sum(part.weight for part in parts)
    if not total:
        raise ValueError(f"{name} is {prompt!r}, whose weights are all 0; give one of its parts more")
    return [Part(part.text, part.weight / total) for part in parts if part.weight]


def mixed_prompt(start: str, end: str, share: float) -> str:
    """A prompt with weights between two prompts, of which `end` has this share, 0 to 1."""
    shares = {"the first prompt": (start, 1 - share), "the last prompt": (end, share)}
    parts = [
        f"{_escaped(part.text)}:{part.weight * own:.6f}"
        for name, (prompt, own) in shares.items()
        for part in parse_prompt(prompt, name)
    ]
    return " | ".join(parts)


def split_prompts(text: str) -> list[str]:
    """Prompts on lines of their own. On a single line without weights, `|` separates them too."""
    prompts = text.strip().splitlines()
    if len(prompts) == 1 and not any(map(_has_weight, SEPARATOR.split(text))):
        prompts = SEPARATOR.split(text)
    return [prompt.strip() for prompt in prompts if prompt.strip()]


def _parse_part(text: str, name: str) -> Part:
    weighted = WEIGHTED.fullmatch(text)
    words, weight = weighted.groups() if weighted else (text, "1")
    if not words.strip():
        raise ValueError(f"{name} has the part {text.strip()!r} without words; put words on both sides of a |")
    if not NUMBER.fullmatch(weight) or float(weight) > MAX_WEIGHT:
        raise ValueError(
            f"{name} has the part {text.strip()!r}, whose weight is {weight.strip()!r}; give a number, 0 to "
            rf"{MAX_WEIGHT}, after its last colon (write \: for a colon, and \| for a | that separates nothing), and "
            "put what the pictures should not show into negative_prompt"
        )
    return Part(_unescaped(words.strip()), float(weight))


def _has_weight(text: str) -> bool:
    weighted = WEIGHTED.fullmatch(text)
    return bool(weighted and NUMBER.fullmatch(weighted[2]))


def _escaped(text: str) -> str:
    end = " " if text.endswith("\\") else ""  # a backslash would escape the colon of the weight
    return text.replace("|", r"\|").replace(":", r"\:") + end


def _unescaped(text: str) -> str:
    return text.replace(r"\|", "|").replace(r"\:", ":")
