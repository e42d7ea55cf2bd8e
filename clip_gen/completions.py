"""Completes prompts that leave something unsaid, such as the background, with phrases from a model's config.yaml."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from clip_gen.config import Completion

GAP = r"\W+(?:(?:an?|the)\W+)?"  # between two words; articles do not count


def needed(texts: Sequence[str], completions: Sequence[Completion]) -> list[Completion]:
    """The completions of a prompt with these parts: those of which no part says anything."""
    return [each for each in completions if not _has(texts, each.unless) and _has(texts, each.replaces or None)]


def completed(text: str, completions: Sequence[Completion], chance: float) -> str:
    """A text with a phrase of each completion. chance: in [0, 1), which phrases."""
    for completion in completions:
        chance *= len(completion.phrases)
        phrase, chance = completion.phrases[int(chance)], chance % 1
        if completion.replaces:
            text = _pattern(completion.replaces).sub(lambda _, phrase=phrase: phrase, text, count=1)
        else:
            text = f"{text} {phrase}"
    return text


def _has(texts: Sequence[str], words: tuple[str, ...] | None) -> bool:
    """Whether some of the words are in one of the texts; True for None."""
    return words is None or (bool(words) and any(map(_pattern(words).search, texts)))


@lru_cache(64)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Finds any of these words, or of these few words in a row."""
    options = "|".join(GAP.join(map(re.escape, each.split())) for each in words)
    return re.compile(rf"(?<![\w-])(?:{options})(?![\w-])", re.IGNORECASE)
