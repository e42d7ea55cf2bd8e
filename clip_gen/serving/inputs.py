"""The inputs of predict.py and train.py: their types and limits, and a check of values against them."""

from __future__ import annotations

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import cog

NOUNS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", cog.Path: "a file"}


class InputError(ValueError):
    """Values that do not fit the inputs, one problem a line."""

    def __init__(self, text: str):
        # Cog takes an error with this word in it for a cancelled request.
        super().__init__(text.replace("cancelled", "canceled"))


@dataclass(frozen=True)
class InputField:
    """One parameter of run() or train(). `info` holds the arguments of its Input()."""

    name: str
    kind: type  # a key of NOUNS
    nullable: bool
    info: cog.FieldInfo

    @property
    def required(self) -> bool:
        """Whether a request must have this input."""
        return self.info.default is None and not self.nullable

    def allowed(self) -> str:
        """The allowed values, for messages: `a whole number, 1 to 64` or `one of png, webp, jpg`."""
        info, noun = self.info, NOUNS[self.kind]
        if info.choices:
            return f"one of {', '.join(map(str, info.choices))}"
        if self.kind is str:
            return f"{info.min_length or 0} to {info.max_length} characters" if info.max_length else noun
        if info.ge is None:
            return noun
        return f"{noun}, {info.ge} or more" if info.le is None else f"{noun}, {info.ge} to {info.le}"

    def convert(self, value: object) -> object:
        """The value in this input's type. InputError if it has another type or is outside the limits."""
        if value is None and self.nullable:
            return None
        if self.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # Cog's server lets 2.0 pass for an int
        if not (self._has_kind(value) and self._in_range(value)):
            raise InputError(f"{self.name} is {_shown(value)}; give {self.allowed()}")
        if self.kind is str and not (self.info.min_length or 0) <= len(value) <= (self.info.max_length or math.inf):
            size = f"has {len(value)} characters" if value else "is empty"
            raise InputError(f"{self.name} {size}; give {self.allowed()}")
        if self.kind is str and "\0" in value:
            raise InputError(f"{self.name} holds a NUL character; leave it out")
        return float(value) if self.kind is float else value

    def _has_kind(self, value: object) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if self.kind is float:
            return isinstance(value, int | float) and not math.isnan(value)
        # Cog passes a text that is no URL on to a Path input. Opening it would read the server's own files.
        return isinstance(value, Path if self.kind is cog.Path else self.kind)

    def _in_range(self, value: Any) -> bool:
        info = self.info
        above_minimum = info.ge is None or value >= info.ge
        below_maximum = info.le is None or value <= info.le
        return above_minimum and below_maximum and (info.choices is None or value in info.choices)


def read_inputs(function: Callable[..., object]) -> dict[str, InputField]:
    """The parameters of run() or train() that have an Input(), by name.

    To be called when the module is imported: Cog's server later replaces the Input() defaults by the values in them.
    """
    fields = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if isinstance(parameter.default, cog.FieldInfo):
            kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
            (kind,) = (kind for kind in kinds if kind is not NoneType)
            fields[name] = InputField(name, kind, NoneType in kinds, parameter.default)
    return fields


def checked(fields: Mapping[str, InputField], /, **values: object) -> dict[str, Any]:
    """The values in their declared types; an input that is left out has its default. InputError lists all problems.

    Cog's server checks requests too, but nothing when it finds no schema file.
    """
    problems = [unknown_input(name, fields) for name in values if name not in fields]
    accepted = {}
    for name, field in fields.items():
        try:
            if name not in values and field.required:
                raise InputError(f"{name} is missing; give {field.allowed()}")
            accepted[name] = field.convert(values.get(name, field.info.default))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return accepted


def unknown_input(name: str, fields: Mapping[str, InputField]) -> str:
    """The sentence about an input that does not exist, with the most similar name."""
    similar = difflib.get_close_matches(name, fields, n=1)
    if similar:
        return f'unknown input "{name}"; did you mean "{similar[0]}"?'
    return f'unknown input "{name}"; the inputs are {", ".join(fields)}'


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
