"""One input of a prediction or training: its type and limits, whether they make sense, whether a value fits them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "Path": Path}
NOUNS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a file"}
NUMBERS = ("int", "float")
TEXT = ("str",)
# What Input() takes, and the types each argument means something for.
ARGUMENTS = {
    "default": tuple(TYPES),
    "description": tuple(TYPES),
    "ge": NUMBERS,
    "le": NUMBERS,
    "min_length": TEXT,
    "max_length": TEXT,
    "regex": TEXT,
    "choices": (*TEXT, *NUMBERS),
    "deprecated": tuple(TYPES),
    "accept": ("Path",),
}
INT32_MAX = 2**31 - 1


class InputError(ValueError):
    """Values that do not fit the inputs, one problem a line."""


@dataclass(frozen=True)
class Kind:
    """A type Cog knows: one of TYPES, perhaps a list of it, perhaps None."""

    name: str
    is_list: bool = False
    nullable: bool = False


@dataclass(frozen=True)
class InputField:
    """One parameter of run() or train(). `arguments` holds what its Input() was given, all literals."""

    name: str
    kind: Kind
    arguments: dict[str, object]

    @property
    def required(self) -> bool:
        """Whether a request without it is refused."""
        return "default" not in self.arguments and not self.kind.nullable

    def wanted(self) -> str:
        """What it takes, for the end of an error: `1 to 64`, `one of png, webp, jpg`."""
        given, noun = self.arguments, NOUNS[self.kind.name]
        if "choices" in given:
            return "one of " + ", ".join(map(str, given["choices"]))
        if self.kind.name == "str":
            low, high = given.get("min_length", 0), given.get("max_length")
            return f"{low} to {high} characters" if high else noun
        low, high = given.get("ge"), given.get("le")
        if low is None and high is None:
            return noun
        if low is None or high is None:
            return f"{noun}, {high} or less" if low is None else f"{noun}, {low} or more"
        return f"{noun}, {low} to {high}"


def field_problems(field: InputField) -> list[str]:
    """What makes no sense about an input, or would make `cog predict` refuse what its documentation allows."""
    given, kind = field.arguments, field.kind
    senseless = [name for name in given if kind.name not in ARGUMENTS[name]]
    if senseless:
        return [f"{name} means nothing for {kind.name}; remove it" for name in senseless]
    found = []
    if not given.get("description"):
        found.append("has no description; the form shows it unexplained")
    low, high = given.get("ge", -math.inf), given.get("le", math.inf)
    if low > high:
        found.append(f"ge {low} is above le {high}")
    if kind.name == "int" and any(math.isfinite(bound) and abs(bound) > INT32_MAX for bound in (low, high)):
        found.append(f"a bound beyond {INT32_MAX} cannot be typed into `cog predict`, which reads 32 bits")
    choices = given.get("choices", [given.get("default")])
    if not isinstance(choices, list) or not choices:
        return [*found, "choices must be a list with something in it"]
    if "choices" in given:
        found += [f"choice {one!r} is no {kind.name}" for one in choices if not _fits(one, kind.name)]
    if "default" not in given:
        return found
    if given["default"] is None:
        # Cog takes `seed: int = Input(default=None)` for required.
        return found if kind.nullable else [*found, "default=None makes it required after all; add `| None`"]
    _, sentence = _cast(field, given["default"])
    return [*found, f"the default does not fit: {sentence}"] if sentence else found


def checked(values: dict[str, object], fields: Sequence[InputField]) -> dict[str, object]:
    """The values as their declared types, defaults filled in. InputError lists everything wrong with them.

    Cog's server checks requests too, but lets 2.0 pass for an int, and checks nothing when it finds no schema.
    """
    names = [field.name for field in fields]
    problems = [unknown_name(name, names) for name in values if name not in names]
    accepted = {}
    for field in fields:
        value = values.get(field.name, field.arguments.get("default"))
        sentence = None
        if field.name not in values and field.required:
            sentence = f"{field.name} is missing; give {field.wanted()}"
        elif value is not None or not field.kind.nullable:
            value, sentence = _cast(field, value)
        if sentence:
            problems.append(sentence)
        accepted[field.name] = value
    if problems:
        raise InputError("\n".join(problems))
    return accepted


def unknown_name(name: str, names: Sequence[str]) -> str:
    """The sentence for an input nobody knows, with the nearest name."""
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f'unknown input "{name}"; did you mean "{near[0]}"?'
    return f'unknown input "{name}"; the inputs are {", ".join(names)}'


def _cast(field: InputField, value: object) -> tuple[object, str | None]:
    """The value as the field's type, and what is wrong with it."""
    if field.kind.is_list:
        if not isinstance(value, list):
            return value, f"{field.name} is {_shown(value)}; give a list"
        pairs = [_cast_one(field, one) for one in value]
        return [one for one, _ in pairs], next((sentence for _, sentence in pairs if sentence), None)
    return _cast_one(field, value)


def _cast_one(field: InputField, value: object) -> tuple[object, str | None]:
    kind, given = field.kind.name, field.arguments
    if kind == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    wrong = f"{field.name} is {_shown(value)}; give {field.wanted()}"
    if not _fits(value, kind):
        return value, wrong
    if kind == "float":
        value = float(value)
    if value not in given.get("choices", [value]):
        return value, wrong
    if kind in NUMBERS and not given.get("ge", -math.inf) <= value <= given.get("le", math.inf):
        return value, wrong
    if kind in TEXT and not given.get("min_length", 0) <= len(value) <= given.get("max_length", math.inf):
        size = f"has {len(value)} characters" if value else "is empty"
        return value, f"{field.name} {size}; give {field.wanted()}"
    if kind in TEXT and "regex" in given and not re.search(given["regex"], value):  # a schema pattern is not anchored
        return value, f"{field.name} is {_shown(value)}; give text that matches {given['regex']}"
    return value, None


def _fits(value: object, kind: str) -> bool:
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    if kind == "float":
        return isinstance(value, int | float) and not math.isnan(value)  # NaN would pass every bound
    # A Path that reaches us as text was no URL: Cog passes it on, and opening it would read the server's own files.
    return isinstance(value, TYPES[kind])


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
