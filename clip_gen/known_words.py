"""The words that a model knows, and warnings about the others in a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from clip_gen.completions import completed, needed
from clip_gen.config import Completion
from clip_gen.networks.clip_encoder import ClipEncoder
from clip_gen.prompts import parse_prompt
from clip_gen.sampling.condition import Condition
from clip_gen.weights.model_folder import VOCABULARY

MAX_SUMMARY = 400  # characters of a warning that says what a model knows


class KnownWords:
    """vocabulary: the text of a model's vocabulary.txt, of which the first line is a summary; "" if it has none.

    completions: those of the model, whose words to replace it need not know.
    """

    def __init__(self, clip: ClipEncoder, vocabulary: str, completions: Sequence[Completion]):
        self.clip = clip
        self.listed = set(re.findall(r"[^\W\d_]+", vocabulary.lower()))
        summary = vocabulary.partition("\n")[0]
        self.summary = "".join(filter(str.isprintable, summary))[:MAX_SUMMARY]  # the file may be a stranger's
        self.replacing = [completion for completion in completions if completion.replaces]

    def warnings(self, condition: Condition) -> list[str]:
        """About words that are unknown, or left out of a prompt that is too long."""
        found = []
        for name in filter(vars(condition).get, ("prompt", "negative_prompt")):
            texts = [part.text for part in parse_prompt(getattr(condition, name), name)]
            if name == "prompt" and condition.picture is None:
                completions = needed(texts, self.replacing)
                texts = [completed(text, completions, 0.0) for text in texts]
            for text in texts:
                found += self._warnings_about(text, name.replace("_", " "))
        return found

    def _warnings_about(self, text: str, name: str) -> list[str]:
        """Of a prompt without weights, or of a part of one with weights."""
        found = []
        if lost := self.clip.tokenize.left_out(text):
            found.append(f"the {name} is longer than this model's CLIP reads; its end is left out: {lost!r}")
        if unknown := self.clip.unknown_words(text, self.listed):
            known = f"; it knows {self.summary} ({VOCABULARY} lists all words)" if self.summary else ""
            found.append(f"this model does not know {', '.join(map(repr, unknown))}{known}")
        return found
