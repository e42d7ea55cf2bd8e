"""prompts.py: parts, weights and escapes."""

from __future__ import annotations

import pytest

from clip_gen.prompts import Part, parse_prompt, split_prompts


def parsed(prompt: str) -> list[tuple[str, float]]:
    return [(part.text, round(part.weight, 6)) for part in parse_prompt(prompt)]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red circle:2 | a blue background:0.5", [("a red circle", 0.8), ("a blue background", 0.2)]),
        ("a circle | a star", [("a circle", 0.5), ("a star", 0.5)]),
        ("a circle|a star:3", [("a circle", 0.25), ("a star", 0.75)]),
        (" a circle : 1 |\ta star :\n1. ", [("a circle", 0.5), ("a star", 0.5)]),
        ("a:.5 | b:+1.5", [("a", 0.25), ("b", 0.75)]),
        ("a clock: 12:30 | a star:10", [("a clock: 12", 0.75), ("a star", 0.25)]),
        (r"a clock at 12\:30 | a star", [("a clock at 12:30", 0.5), ("a star", 0.5)]),
        (r"a\:b\:2 | c\|d:3", [("a:b:2", 0.25), ("c|d", 0.75)]),
        ("a:1 | b:0 | c:1", [("a", 0.5), ("c", 0.5)]),
        ("a:1 | b:0", [("a", 1.0)]),
        ("a:1000 | b:1000", [("a", 0.5), ("b", 0.5)]),
    ],
)
def test_a_weight_is_the_number_after_the_last_colon_of_a_part(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert parsed(prompt) == parts


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a clock at 12:30", "a clock at 12:30"),
        ("a red circle:2", "a red circle:2"),
        ("a note: red", "a note: red"),
        (" a star ", " a star "),
        (r"a \| b", "a | b"),
        (r"a\:b", "a:b"),
        (r"C:\dir", r"C:\dir"),
        (r"a \\| b", r"a \| b"),
        ("", ""),
    ],
)
def test_a_prompt_without_an_unescaped_bar_has_no_weights(prompt: str, text: str) -> None:
    assert parse_prompt(prompt) == [Part(text, 1.0)]


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [
        ("a: red | b", "red"),
        ("a: | b", ""),
        ("a:-1 | b", "-1"),
        ("a:1,5 | b", "1,5"),
        ("a:1e3 | b", "1e3"),
        ("a:nan | b", "nan"),
        ("a:inf | b", "inf"),
        ("a:1_0 | b", "1_0"),
        ("a:. | b", "."),
        ("a:２ | b", "２"),
        ("a:1 2 | b", "1 2"),
        ("a:1000.5 | b", "1000.5"),
        (f"a:{'9' * 400} | b", "9" * 400),
    ],
)
def test_a_malformed_weight_is_an_error_that_names_it(prompt: str, weight: str) -> None:
    with pytest.raises(ValueError, match="give a number, 0 to 1000, after its last colon") as error:
        parse_prompt(prompt)
    part = prompt.split("|")[0].strip()
    assert str(error.value).startswith(f"prompt has the part {part!r}, whose weight is {weight!r}; ")
    assert r"\: for a colon" in str(error.value)
    assert "negative_prompt" in str(error.value)


@pytest.mark.parametrize("prompt", ["a |", "| a", "|", "a | | b", "a | :2", " : 2|a"])
def test_a_part_without_words_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"prompt has the part '.*' without words; put words on both sides"):
        parse_prompt(prompt)


def test_weights_that_are_all_zero_and_too_many_parts_are_errors() -> None:
    with pytest.raises(ValueError, match=r"negative_prompt is 'a:0 \| b:0', whose weights are all 0; give"):
        parse_prompt("a:0 | b:0", "negative_prompt")
    assert len(parse_prompt(" | ".join("a" * 16))) == 16
    with pytest.raises(ValueError, match=r"prompt has 17 parts between \|; give 16 or fewer"):
        parse_prompt(" | ".join("a" * 17))


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a red circle | a star", ["a red circle", "a star"]),
        ("a red circle\na star:2 | a heart\n\n", ["a red circle", "a star:2 | a heart"]),
        ("a circle | a star\r\na heart", ["a circle | a star", "a heart"]),
        ("a circle:2 | a star", ["a circle:2 | a star"]),
        ("a note: red | a star|", ["a note: red", "a star"]),
        (r"a \| b | c", [r"a \| b", "c"]),
        ("a star", ["a star"]),
        (" \n ", []),
        ("", []),
    ],
)
def test_sample_prompts_are_lines_or_a_line_without_weights_split_at_bars(text: str, prompts: list[str]) -> None:
    assert split_prompts(text) == prompts
