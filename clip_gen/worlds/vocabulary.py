"""vocabulary.txt in a model folder: what the model's CLIP knows, for people and for warnings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


def vocabulary_text(summary: str, lists: Mapping[str, Iterable[str]]) -> str:
    """summary: what the model knows in one line, which warnings quote. lists: all words, by heading."""
    return "\n\n".join([summary, *(f"{heading}: {', '.join(words)}" for heading, words in lists.items())]) + "\n"


def enumerated(words: Sequence[str]) -> str:
    """For example "red, green and blue"."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def words_between(templates: Iterable[str]) -> list[str]:
    """The sorted words of caption templates, without their fields."""
    return sorted({word for text in templates for word in re.findall(r"\w+", re.sub(r"{\w+}", "", text))})
