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

from clip_gen.files import shortened

NOUNS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", cog.Path: "a file"}


class InputError(ValueError):
    """Values that do not fit the inputs, one problem a line."""


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
            return f"one of {', '.join(info.choices)}"
        if info.max_length:
            return f"{info.min_length or 0} to {info.max_length} characters"
        if info.ge is None:
            return noun
        return f"{noun}, {info.ge} or more" if info.le is None else f"{noun}, {info.ge} to {info.le}"

    def limits(self) -> str:
        """The allowed values and the default, for the help."""
        default = self.info.default
        return self.allowed() if default in (None, "") else f"{self.allowed()}; default {default}"

    def convert(self, value: object) -> object:
        """The value in this input's type. InputError if it has another type or is outside the limits."""
        if value is None and self.nullable:
            return None
        if self.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # Cog's server accepts 2.0 for an int
        if not self._fits(value):
            raise InputError(f"{self.name} is {_shown(value)}; give {self.allowed()}")
        return float(value) if self.kind is float else value

    def _fits(self, value: Any) -> bool:
        info = self.info
        # Cog passes a text that is no URL on to a Path input. Opening it would read the server's own files.
        wanted = {float: int | float, cog.Path: Path}.get(self.kind, self.kind)
        if not isinstance(value, wanted) or isinstance(value, bool) != (self.kind is bool):
            return False
        if self.kind is str:
            right_length = (info.min_length or 0) <= len(value) <= (info.max_length or math.inf)
            return right_length and (info.choices is None or value in info.choices)
        return (info.ge is None or value >= info.ge) and (info.le is None or value <= info.le)


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
    problems = [_unknown(name, fields) for name in values if name not in fields]
    accepted = {}
    for name, field in fields.items():
        try:
            accepted[name] = field.convert(values.get(name, field.info.default))
        except InputError as error:
            problems.append(str(error))
    if problems:
        # Cog takes an error that contains "cancelled" for a cancelled request.
        raise InputError("\n".join(problems).replace("cancelled", "canceled"))
    return accepted


def _unknown(name: str, fields: Mapping[str, InputField]) -> str:
    similar = difflib.get_close_matches(name, fields, n=1)
    remedy = f'did you mean "{similar[0]}"?' if similar else f"the inputs are {', '.join(fields)}"
    return f'unknown input "{name}"; {remedy}'


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{shortened(value)}"' if isinstance(value, str) else str(value)
