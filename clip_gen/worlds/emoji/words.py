"""The words for things: nouns that captions use, nouns that none uses, and kinds ("animal")."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

# Plurals that no rule below makes.
PLURALS = {"mouse": "mice", "die": "dice", "wolf": "wolves", "knife": "knives", "leaf": "leaves", "loaf": "loaves"}
PLURALS |= {"tomato": "tomatoes", "potato": "potatoes", "cactus": "cacti", "fungus": "fungi", "child": "children"}
PLURALS |= {"ox": "oxen", "snowman": "snowmen"}
PLURALS |= {word: word for word in ("sheep", "fish", "deer", "squid", "shrimp", "goldfish", "blowfish", "pufferfish")}

# Nouns that take no article and have no other plural.
WITHOUT_ARTICLE = frozenset(
    line.strip()
    for line in """
    ale, bacon, beer, books, bow and arrow, bowling, bread, chains, cheese, cherries, chips, chocolate, clothing,
    coffee, corn, crossed swords, cutlery, dice, earphones, espresso, fire, food, fork and knife, french fries, fries,
    fruit, furniture, glasses, grapes, headphones, honey, jeans, juice, lightning, maize, milk, money, noodles,
    pancakes, pants, paper, pasta, peanuts, piano keys, popcorn, scales, scissors, shades, shears, skis, spaghetti,
    spectacles, sunglasses, sushi, swords, trousers, wine
    """.replace("\n", " ").split(",")
)
VOWELS = "aeiou"
CONSONANT_SOUNDS, VOWEL_SOUNDS = ("unicorn",), ("hour",)  # take "a" and "an" in spite of their first letter


class Thing(NamedTuple):
    """name: the CLDR short name. nouns: of captions, the standard one first. unseen: nouns that no caption uses."""

    name: str
    nouns: tuple[str, ...]
    unseen: tuple[str, ...]
    kinds: tuple[str, ...]


@cache
def things() -> dict[str, Thing]:
    """All things by name."""
    table = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
    parsed = {}
    for name, line in table.items():
        parts = (tuple(filter(None, map(str.strip, part.split(",")))) for part in line.split("/"))
        parsed[name] = Thing(name, *parts)
    return parsed


@cache
def kinds() -> dict[str, frozenset[str]]:
    """The names of the things of each kind."""
    names = sorted({kind for thing in things().values() for kind in thing.kinds})
    return {kind: frozenset(name for name, thing in things().items() if kind in thing.kinds) for kind in names}


def plural(noun: str) -> str:
    """The plural of "slice of pizza" is "slices of pizza"."""
    if noun in WITHOUT_ARTICLE:
        return noun
    head, of, rest = noun.partition(" of ")
    before, space, last = head.rpartition(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith("y") and last[-2] not in VOWELS:
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return before + space + last + of + rest


def with_article(phrase: str, noun: str) -> str:
    """The phrase, whose noun is given, with "a" or "an", or with nothing if the noun takes no article."""
    if noun in WITHOUT_ARTICLE:
        return phrase
    begins_with_vowel = phrase[0].lower() in VOWELS and not phrase.startswith(CONSONANT_SOUNDS)
    return ("an " if begins_with_vowel or phrase.startswith(VOWEL_SOUNDS) else "a ") + phrase
