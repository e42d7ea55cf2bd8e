"""The inputs and the output of predict.py and train.py, read from their source without importing them.

Cog's own generator reads the source too, and what it cannot read it drops without a word: a bound, a default, half a
description. Here each of those is an error that names the line and the remedy.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from clip_gen.serving.expressions import NotPlainError, dotted, literal, parse_kind
from clip_gen.serving.inputs import ARGUMENTS, TYPES, InputField, Kind, field_problems

UNKNOWN = "unknown"  # **unknown receives the inputs that Cog does not know and, without a schema, does not strip


class SignatureError(ValueError):
    """What Cog would misread, one problem a line."""


@dataclass(frozen=True)
class Signature:
    """What Cog serves from one file. `output` is a kind, or the fields of a BaseModel."""

    inputs: tuple[InputField, ...]
    output: Kind | dict[str, Kind]
    is_async: bool
    slots: int  # predictions at once, from @cog.concurrent(max=...)


def read_signature(path: Path, name: str) -> Signature:
    """The signature of class `name`'s run(), or of function `name`. SignatureError lists every problem found."""
    reader = _Reader(path)
    function, is_method = reader.find(name)
    inputs = reader.inputs(function, is_method)
    output = reader.output(function)
    is_async = isinstance(function, ast.AsyncFunctionDef)
    slots = reader.slots(function)
    if slots > 1 and not is_async:
        reader.problem(function, f"@concurrent(max={slots}) needs `async def {function.name}`")
    reader.raise_problems()
    return Signature(inputs, output, is_async, slots)


class _Reader:
    """One source file and the problems found in it so far."""

    def __init__(self, path: Path):
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source, str(path))
        self.problems: list[str] = []

    def problem(self, node: ast.AST, sentence: str) -> None:
        self.problems.append(f"{self.path.name}:{node.lineno}: {sentence}")

    def raise_problems(self) -> None:
        if self.problems:
            raise SignatureError("\n".join(self.problems))

    def find(self, name: str) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]:
        """The function Cog calls, and whether it is a method."""
        for node in self.tree.body:
            if getattr(node, "name", None) != name:
                continue
            if not isinstance(node, ast.ClassDef):
                return node, False
            methods = {
                item.name: item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            if "run" in methods and "predict" in methods:
                self.problem(node, f"class {name} has both run and predict, and Cog refuses it; keep run")
            elif "run" not in methods:
                self.problem(node, f"class {name} has no run method of its own; Cog calls run")
            self.raise_problems()
            return methods["run"], True
        raise SignatureError(f"{self.path.name}: no class or function named {name}")

    def inputs(self, function: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> tuple[InputField, ...]:
        arguments = function.args
        for extra in (arguments.vararg, arguments.kwarg):
            if extra and extra.arg != UNKNOWN:
                self.problem(extra, f"*{extra.arg} is no input; Cog ignores it without a word. Name each input")
        positional = [*arguments.posonlyargs, *arguments.args]
        defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
        pairs = list(zip(positional, defaults, strict=True))[1 if is_method else 0 :]
        pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        fields = (self.field(parameter, default) for parameter, default in pairs)
        return tuple(field for field in fields if field)

    def field(self, parameter: ast.arg, default: ast.expr | None) -> InputField | None:
        if parameter.annotation is None:
            self.problem(parameter, f"{parameter.arg} has no type, so Cog ignores it; annotate it")
            return None
        kind = self.kind(parameter.annotation, f"input {parameter.arg}")
        if not (isinstance(default, ast.Call) and dotted(default.func) in ("Input", "cog.Input")):
            self.problem(parameter, f"{parameter.arg} has no Input(description=...); the form shows it unexplained")
            return None
        given = self.given(parameter.arg, default)
        if kind is None or given is None:
            return None
        field = InputField(parameter.arg, kind, given)
        for sentence in field_problems(field):
            self.problem(parameter, f"{parameter.arg}: {sentence}")
        return field

    def given(self, name: str, call: ast.Call) -> dict[str, object] | None:
        """The literals an Input() was given, or None when one cannot be read."""
        before = len(self.problems)
        if call.args:
            self.problem(call, f"{name}: Cog loses a default given by position; write Input(default=...)")
        given = {}
        for keyword in call.keywords:
            if keyword.arg not in ARGUMENTS:
                self.problem(keyword, f"{name}: Input() takes no {keyword.arg}; use {', '.join(ARGUMENTS)}")
                continue
            try:
                given[keyword.arg] = literal(self.source, keyword)
            except NotPlainError as error:
                self.problem(
                    keyword,
                    f"{name}: {keyword.arg} is {error}, which Cog drops or mangles without a word; "
                    "write one plain literal",
                )
        return given if len(self.problems) == before else None

    def kind(self, node: ast.expr, what: str) -> Kind | None:
        kind = parse_kind(node)
        if kind is None:
            text = ast.get_source_segment(self.source, node)
            self.problem(node, f"{what} has type {text}; use {', '.join(TYPES)}, list[...] of one, or `| None`")
        return kind

    def output(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Kind | dict[str, Kind] | None:
        if function.returns is None:
            self.problem(function, f"{function.name} has no return type; Cog needs one")
            return None
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == dotted(function.returns):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                return {item.target.id: self.kind(item.annotation, f"field {item.target.id}") for item in fields}
        kind = self.kind(function.returns, "the output")
        if kind and kind.nullable:
            self.problem(function.returns, "Cog refuses an output that may be None")
        return kind

    def slots(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        """The literal of @cog.concurrent(max=...), 1 without it."""
        slots = 1
        for decorator in function.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            name = dotted(call.func if call else decorator).removeprefix("cog.")
            if name != "concurrent":
                # A wrapper hides the defaults from Cog: inputs left out would arrive as FieldInfo objects.
                self.problem(decorator, f"@{name} around {function.name} breaks every default; use it inside")
            else:
                found = {keyword.arg: keyword.value for keyword in call.keywords} if call else {}
                value = getattr(found.get("max"), "value", None)
                if type(value) is not int or value < 1:
                    self.problem(decorator, "@concurrent wants max=, a whole number written out")
                else:
                    slots = value
        return slots
