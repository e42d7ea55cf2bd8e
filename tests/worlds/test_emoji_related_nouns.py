"""worlds/emoji/related_nouns.py: nouns that no caption uses, and the nearest that captions use."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from clip_gen.worlds.emoji.pairs import synonym_captions
from clip_gen.worlds.emoji.related_nouns import above, candidates, find_related, homes, read_wordnet, related_nouns
from clip_gen.worlds.emoji.words import kinds, plural, things

NOUNS = {noun for thing in things().values() for noun in thing.nouns}
# A few lines in the format of WordNet: animal (above all), cat and its synonym, lynx below it; wren, a bird; spanner.
DATA = """\
  1 A licence.
00000001 05 n 01 animal 0 000 | a living thing
00000002 05 n 02 cat 0 tabby_cat 0 001 @ 00000001 n 0000 | a pet
00000003 05 n 01 lynx 0 001 @ 00000002 n 0000 | a wild cat
00000004 05 n 01 bird 0 001 @ 00000001 n 0000 | it flies
00000005 05 n 01 wren 0 001 @ 00000004 n 0000 | a small bird
00000006 06 n 01 wrench 0 000 | a tool
00000007 06 n 01 table 0 000 | furniture
"""
INDEX = """\
  1 A licence.
animal n 1 0 1 0 00000001
bird n 1 1 @ 1 0 00000004
cat n 1 1 @ 1 0 00000002
lynx n 1 1 @ 1 0 00000003
tabby_cat n 1 1 @ 1 0 00000002
table n 1 0 1 0 00000007
wren n 1 1 @ 1 0 00000005
wrench n 1 0 1 0 00000006
"""
NEAR = {"lynx": {"cat": 0.3}, "tabby cat": {"cat": 0.5}, "wren": {"wrench": 0.9, "bird": 0.4}, "table": {"bed": 0.4}}


def embed(texts: Sequence[str]) -> np.ndarray:
    """An axis for each noun of captions; words of NEAR point to these."""
    axes = {text: i for i, text in enumerate([*NOUNS, *kinds()])}
    rows = np.zeros((len(texts), len(axes)))
    for row, text in zip(rows, (text.removeprefix("a photo of a ") for text in texts), strict=True):
        for other, cosine in NEAR.get(text, {text: 1.0}).items():
            row[axes[other]] = cosine
    return rows


def test_wordnet_and_the_encoder_together_find_the_nearest_noun(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(DATA)
    (tmp_path / "index.noun").write_text(INDEX)
    net = read_wordnet(tmp_path)
    places = homes(net)
    assert above("tabby cat", net, places) == ("cat", 0)
    assert above("lynx", net, places) == ("cat", 1)
    assert above("table", net, places) is None
    words = candidates(net, places)
    assert words == ["lynx", "tabby cat", "table", "wren"]
    # A wren is no tool, although its name begins like one; a table is near to nothing.
    assert find_related(words, embed, net) == {"lynx": "cat", "tabby cat": "cat", "wren": "bird"}


def test_the_table_has_only_new_words_and_nouns_that_captions_use() -> None:
    table = related_nouns()
    assert 3000 < len(table) < 10_000
    assert not set(table) & NOUNS
    assert set(table.values()) <= NOUNS | set(kinds())
    assert (table["pussycat"], table["mallard"], table["cargo ship"]) == ("cat", "duck", "ship")


@pytest.mark.parametrize(("half", "right", "wrong"), [(0, 30, 4), (1, 35, 10)])
def test_most_nouns_in_the_table_mean_the_right_thing(half: int, right: int, wrong: int) -> None:
    """Nouns that no caption uses: 51 with which the threshold was chosen, and 65 others."""
    counts = {True: 0, False: 0}
    for thing in things().values():
        for noun in thing.unseen:
            if noun in related_nouns() and hashlib.sha256(noun.encode()).digest()[0] % 2 == half:
                counts[related_nouns()[noun] in thing.nouns] += 1
    assert counts == {True: right, False: wrong}


def test_a_pair_of_captions_differs_in_the_noun_alone() -> None:
    forms = {word: {(word, noun), (plural(word), plural(noun))} for word, noun in related_nouns().items()}
    for seed in range(20):
        new, known = synonym_captions(np.random.default_rng(seed))
        pairs = {pair for word, pairs in forms.items() if word in new or plural(word) in new for pair in pairs}
        bare = [re.sub(r"\b(a|an) ", "", text) for text in (new, known)]
        assert new != known
        assert any(bare[0].replace(one, other, 1) == bare[1] for one, other in pairs), (new, known)
